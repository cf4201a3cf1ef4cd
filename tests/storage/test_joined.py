import errno

import pytest

from nbdserve.extents import DATA, ZERO
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.joined import PART_BITS, JoinedStorage
from nbdserve.storage.memory import PAGE_SIZE, MemoryStorage

SECOND = 1 << PART_BITS


class Watched(MemoryStorage):
    """Counts the calls that matter here."""

    flushes = closes = stable = writebacks = 0
    failure: OSError | None = None

    def begin_writeback(self) -> None:
        self.writebacks += 1

    async def flush(self) -> None:
        self.flushes += 1
        if self.failure is not None:
            raise self.failure

    async def write_stable(self, pieces: list[tuple[int, ReadBuffer]]) -> None:  # type: ignore[override]
        self.stable += 1
        await self.write_all(pieces)

    async def close(self) -> None:
        self.closes += 1
        await super().close()
        if self.failure is not None:
            raise self.failure


def joined() -> tuple[JoinedStorage, Watched, Watched]:
    parts = Watched(b"a" * 1000), Watched(b"b" * 2000)
    return JoinedStorage(parts, "both"), *parts


async def test_each_file_has_addresses_of_its_own() -> None:
    both, first, second = joined()
    assert both.size == SECOND + 2000
    buffer = bytearray(4)
    assert both.try_read_into(SECOND + 1998, memoryview(buffer))
    assert bytes(buffer) == b"bb\0\0"
    assert await both.read(998, 4) == b"aa\0\0"
    assert both.try_write(SECOND + 2, b"two")
    await both.write(1, b"one")
    assert await first.read(0, 5) == b"aonea"
    assert await second.read(0, 6) == b"bbtwob"
    await both.zero(SECOND, 3)
    await both.discard(0, 1)
    assert await second.read(0, 6) == b"\0\0\0wob"
    assert await first.read(0, 3) == b"\0on"


async def test_many_writes_are_sorted_by_file() -> None:
    both, first, second = joined()
    await both.write_all([(SECOND + 5, b"x"), (0, b"y"), (SECOND, b"z")])
    assert await first.read(0, 2) == b"ya"
    assert await second.read(0, 6) == b"zbbbbx"
    await both.write_stable([(SECOND + 1, b"q")])
    assert (first.stable, second.stable) == (0, 1)
    await both.flush()
    assert (first.flushes, second.flushes) == (1, 1)


async def test_an_address_in_no_file_is_an_error() -> None:
    both, _, _ = joined()
    for offset in (2 << PART_BITS, -1):
        with pytest.raises(OSError) as caught:
            await both.read(offset, 1)
        assert caught.value.errno == errno.EIO


async def test_it_has_no_size_to_set() -> None:
    both, _, _ = joined()
    with pytest.raises(OSError) as caught:
        await both.truncate(5)
    assert caught.value.errno == errno.ENOTSUP


async def test_the_map_of_a_file_is_in_its_addresses() -> None:
    sparse = MemoryStorage(size=4 * PAGE_SIZE)
    await sparse.write(PAGE_SIZE, b"x")
    both = JoinedStorage((MemoryStorage(b"a"), sparse), "both")
    runs = await both.host_map(SECOND, 3 * PAGE_SIZE)
    assert runs.kind.tolist() == [ZERO, DATA, ZERO]
    assert runs.start.tolist() == [SECOND, SECOND + PAGE_SIZE, SECOND + 2 * PAGE_SIZE]
    assert runs.host_offset.tolist() == [-1, SECOND + PAGE_SIZE, -1]
    assert both.allocated_size() == 2 * PAGE_SIZE


async def test_one_failure_leaves_no_file_out() -> None:
    both, first, second = joined()
    first.failure = OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        await both.flush()
    assert second.flushes == 1
    with pytest.raises(OSError, match="broken"):
        await both.close()
    assert (first.closes, second.closes) == (1, 1)
    await both.parts[1].close()


def test_what_one_file_is_all_are() -> None:
    parts = MemoryStorage(b"a"), MemoryStorage(b"b")
    assert not JoinedStorage(parts, "both").read_only
    parts[1].read_only = True
    parts[0].grows_zeroed = False
    parts[1].alignment = 512
    both = JoinedStorage(parts, "both")
    assert (both.read_only, both.grows_zeroed, both.alignment) == (True, False, 512)


async def test_writeback_is_begun_in_every_file() -> None:
    storage, first, second = joined()
    storage.begin_writeback()
    assert (first.writebacks, second.writebacks) == (1, 1)
