"""Preallocated ranges."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.formats.reserve import reserve
from nbdserve.storage.file import FileStorage
from nbdserve.units import MIB


@pytest.mark.parametrize(
    ("mode", "takes_space"), [("off", False), ("metadata", False), ("falloc", True), ("full", True)]
)
async def test_a_range_reads_as_zeroes_and_has_the_space_asked_for(
    tmp_path: Path, mode: str, takes_space: bool
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xa5" * 4096)
    storage = await FileStorage.open(str(path))
    await storage.truncate(4 * MIB)
    await reserve(storage, 4096, 2 * MIB + 512, mode)
    assert (storage.allocated_size() >= 2 * MIB) == takes_space
    await storage.close()
    assert path.read_bytes() == b"\xa5" * 4096 + bytes(4 * MIB - 4096)
