"""Pages as they are to be."""

from __future__ import annotations

from nbdserve.formats.vhdx.pages import ChangedPages
from nbdserve.storage.memory import MemoryStorage


async def test_bytes_are_put_into_copies_of_the_pages() -> None:
    storage = MemoryStorage()
    before = bytes(number % 251 for number in range(5 * 4096))
    await storage.write(0, before)
    pages = ChangedPages(storage)
    await pages.put(4 * 4096 + 7, b"last")
    await pages.put(4000, b"x" * 4300)
    await pages.put(4001, b"y")
    wanted = bytearray(before)
    wanted[4000:8300] = b"xy" + b"x" * 4298
    wanted[16391:16395] = b"last"
    assert [offset for offset, _ in pages.pieces()] == [0, 4096, 8192, 16384]
    assert all(bytes(data) == wanted[offset : offset + 4096] for offset, data in pages.pieces())
    assert await storage.read(0, len(before)) == before
