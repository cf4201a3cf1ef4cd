from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.units import KIB


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "disk"
    file.write_bytes(b"a" * 64 * KIB)
    return str(file)
