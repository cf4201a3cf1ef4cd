from __future__ import annotations

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.create import create_vdi, plan_header
from nbdserve.formats.vdi.driver import VdiDriver
from nbdserve.formats.vdi.layout import Header
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB


@pytest.mark.parametrize(
    "options",
    [
        {"static": "maybe"},
        {"block_size": "1M"},
        {"backing_file": "x"},
        {"backing_file": "x", "backing_fmt": "raw"},
        {"backing_file": "x", "backing_fmt": "vdi", "static": "on"},
    ],
)
def test_bad_options(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"static=|block_size|the parent of a VDI image"):
        VdiDriver.validate_create(MIB, options)


def test_a_size_that_is_too_large() -> None:
    VdiDriver.validate_create(layout.MAX_SIZE, {})
    with pytest.raises(ConfigError, match="at most"):
        VdiDriver.validate_create(layout.MAX_SIZE + 512, {})


@pytest.mark.parametrize("static", ["on", "off"])
async def test_whatever_the_file_held_is_gone(static: str) -> None:
    storage = MemoryStorage(b"x" * 5 * MIB)
    header = plan_header(2 * MIB, {"static": static})
    await create_vdi(storage, header)
    assert Header.parse(await storage.read(0, 512), "a", storage.size) == header
    assert storage.size == header.data_offset + (2 * MIB if static == "on" else 0)
    entries = [0, 1] if static == "on" else [0xFFFF_FFFF] * 2
    assert await storage.read(512, 8) == b"".join(entry.to_bytes(4, "little") for entry in entries)
    assert await storage.read(520, storage.size) == bytes(storage.size)
