from __future__ import annotations

import asyncio
import errno

import pytest

from nbdserve.errors import RequestError
from nbdserve.formats.unit_cache import AT_ONCE, UnitCache
from nbdserve.storage.memory import MemoryStorage


class Expander:
    """Doubles what is stored, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, stored: bytearray) -> bytes:
        self.calls += 1
        return bytes(stored) * 2


async def test_a_unit_is_made_once() -> None:
    cache, expand = UnitCache(MemoryStorage(b"abcdef")), Expander()
    both = await asyncio.gather(cache.read(1, 2, 3, expand), cache.read(1, 2, 3, expand))
    assert both == [b"cdecde", b"cdecde"]
    assert await cache.read(1, 2, 3, expand) == b"cdecde"
    assert expand.calls == 1


async def test_the_units_not_used_for_longest_are_dropped() -> None:
    cache, expand = UnitCache(MemoryStorage(bytes(100)), limit=25), Expander()
    for key in (1, 2, 1, 3):  # 10 bytes each
        await cache.read(key, 0, 5, expand)
    assert expand.calls == 3
    await cache.read(1, 0, 5, expand)
    assert expand.calls == 3
    await cache.read(2, 0, 5, expand)
    assert expand.calls == 4


async def test_a_unit_larger_than_the_limit_is_kept_alone() -> None:
    cache, expand = UnitCache(MemoryStorage(bytes(100)), limit=25), Expander()
    await cache.read(1, 0, 50, expand)
    await cache.read(1, 0, 50, expand)
    assert expand.calls == 1


async def test_what_is_not_in_the_file_is_not_read() -> None:
    cache = UnitCache(MemoryStorage(bytes(100), path="disk.img"))
    with pytest.raises(RequestError, match=r"disk\.img: compressed data at 0x60 ends past the end") as caught:
        await cache.read(1, 96, 5, Expander())
    assert caught.value.errno == errno.EIO


async def test_a_failure_names_the_place_and_is_not_kept() -> None:
    def fail(stored: bytearray) -> bytes:
        raise RequestError(errno.EIO, "bad")

    cache, expand = UnitCache(MemoryStorage(bytes(100), path="disk.img")), Expander()
    with pytest.raises(RequestError, match=r"disk\.img: at 0x10: bad"):
        await cache.read(1, 16, 5, fail)
    assert await cache.read(1, 16, 5, expand) == bytes(10)


async def test_not_all_units_are_made_at_once() -> None:
    class Slow(MemoryStorage):
        reading = most = 0

        def try_read_into(self, offset: int, buffer: memoryview) -> bool:
            return False

        async def read_into(self, offset: int, buffer: memoryview) -> None:
            self.reading += 1
            self.most = max(self.most, self.reading)
            await asyncio.sleep(0.001)
            self.reading -= 1

    storage, expand = Slow(bytes(1000)), Expander()
    cache = UnitCache(storage)
    await asyncio.gather(*(cache.read(key, key, 1, expand) for key in range(3 * AT_ONCE)))
    assert (storage.most, expand.calls) == (AT_ONCE, 3 * AT_ONCE)
