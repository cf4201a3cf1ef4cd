"""Modules stay readable in one sitting."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.house.repository import PACKAGE, TESTS, python_files, shown

WANTED_LINES = 500
MOST_LINES = 800


@pytest.mark.parametrize("path", list(python_files(PACKAGE, TESTS)), ids=shown)
def test_a_module_is_not_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    if lines >= WANTED_LINES:
        warnings.warn(f"{shown(path)} has {lines} lines; split it before it reaches {MOST_LINES}", stacklevel=1)
    assert lines < MOST_LINES
