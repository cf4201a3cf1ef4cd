from __future__ import annotations

from nbdserve.formats.raw_cow.header import HeaderSector, read_header
from nbdserve.formats.raw_cow.layout import Header, with_checksum
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB


class Watched(MemoryStorage):
    """Remembers what was written, and when it was made stable."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.calls: list[object] = []

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self.calls.append((offset, len(data)))
        await super().write(offset, data)

    async def flush(self) -> None:
        self.calls.append("flush")


async def test_a_change_is_one_sector_and_durable() -> None:
    before = Header(size=MIB, raw_file="x" * 1023, backing_file="b", backing_format="raw", compatible=7, autoclear=1)
    storage = Watched(before.build().ljust(before.end_offset, b"\0"))
    header, stored = await read_header(storage)
    assert header == before
    await HeaderSector(storage, stored).patch(size=MIB // 2, autoclear_features=0)
    assert storage.calls == [(2048, 512), "flush"]
    after, _ = await read_header(storage)
    assert (after.size, after.autoclear, after.compatible) == (MIB // 2, 0, 7)
    assert after.raw_file == before.raw_file


async def test_bytes_nobody_knows_are_kept() -> None:
    data = bytearray(Header(size=MIB, raw_file="r").build())
    data[2300:2304] = b"left"
    data[4000:4004] = b"over"
    storage = Watched(with_checksum(bytes(data)).ljust(5120, b"\0"))
    _, stored = await read_header(storage)
    await HeaderSector(storage, stored).patch(size=512)
    header, stored = await read_header(storage)
    assert header.size == 512
    assert (stored[2300:2304], stored[4000:4004]) == (b"left", b"over")
