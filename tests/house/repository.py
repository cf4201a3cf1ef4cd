"""The repository as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nbdserve"
TESTS = ROOT / "tests"


def python_files(*directories: Path) -> Iterator[Path]:
    """Every Python source under the directories."""
    for directory in directories:
        yield from sorted(directory.rglob("*.py"))


def shown(path: Path) -> str:
    """The path as messages name it."""
    return str(path.relative_to(ROOT))
