"""What the conformance suite does not cover: the memory used."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.extents import DATA, ZERO
from nbdserve.storage.memory import PAGE_SIZE, MemoryStorage


async def test_content_and_size() -> None:
    storage = MemoryStorage(b"abc", size=10)
    assert storage.size == 10
    assert await storage.read(0, 12) == b"abc" + bytes(9)
    assert MemoryStorage(b"abc").size == 3


async def test_attempts_always_succeed() -> None:
    storage = MemoryStorage()
    assert storage.try_write(PAGE_SIZE - 1, b"ab")
    buffer = bytearray(4)
    assert storage.try_read_into(PAGE_SIZE - 2, memoryview(buffer))
    assert buffer == b"\0ab\0"


async def test_only_written_pages_take_memory() -> None:
    storage = MemoryStorage(size=1 << 50)
    await storage.write(1 << 49, b"a")
    assert storage.allocated_size() == PAGE_SIZE
    await storage.zero(0, 1 << 50)
    assert storage.allocated_size() == 0


async def test_read_only_refuses() -> None:
    storage = MemoryStorage(b"abc")
    storage.read_only = True
    assert not storage.try_write(0, b"x")
    with pytest.raises(OSError) as caught:
        await storage.write(0, b"x")
    assert caught.value.errno == errno.EROFS


@given(
    st.sets(st.integers(0, 12)),
    st.integers(0, 12 * PAGE_SIZE),
    st.integers(1, 4 * PAGE_SIZE),
    st.integers(0, 13 * PAGE_SIZE),
)
async def test_host_map_is_the_pages(pages: set[int], offset: int, length: int, size: int) -> None:
    storage = MemoryStorage()
    for page in pages:
        await storage.write(page * PAGE_SIZE, b"a")
    storage.size = size
    found = await storage.host_map(offset, length)
    assert found.start[0] == offset
    assert int(found.length.sum()) == length
    for start, count, kind in zip(found.start.tolist(), found.length.tolist(), found.kind.tolist(), strict=True):
        for position in {start, start + count - 1}:
            assert (kind == DATA) == (position // PAGE_SIZE in pages and position < size)
    assert set(found.kind.tolist()) <= {DATA, ZERO}
    assert (found.kind[1:] != found.kind[:-1]).all()
