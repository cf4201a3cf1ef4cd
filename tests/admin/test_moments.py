import asyncio
import errno
import random

import pytest

from nbdserve.admin.moments import Moment
from nbdserve.block.filters.snapshot_access import snapshot_access
from nbdserve.block.node import Node
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB

SIZE = 1 << 20


class Slow(MemoryStorage):
    """Gives way before it reads or writes, and fails when told to."""

    failure: OSError | None = None
    delay = 0.0

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        super().try_read_into(offset, buffer)

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return False

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await asyncio.sleep(self.delay)
        if self.failure is not None:
            raise self.failure
        super().try_write(offset, data)


async def disk(storage: MemoryStorage) -> Node:
    return Node([await RawDriver.open(storage, {}, read_only=False)])


async def kept(content: bytes, **options: float) -> tuple[Node, Slow, Moment, Node]:
    source, fleece = await disk(Slow(content)), Slow(size=len(content))
    moment = Moment(source, await disk(fleece), **options)  # type: ignore[arg-type]
    return source, fleece, moment, snapshot_access(moment, "view")


async def test_clients_write_and_the_moment_stays() -> None:
    rng = random.Random(4)
    content = rng.randbytes(SIZE)
    source, _, moment, view = await kept(content)
    now = bytearray(content)

    async def write() -> None:
        for _ in range(40):
            length = rng.randrange(1, 96 * KIB)
            offset = rng.randrange(SIZE - length)
            data = rng.randbytes(length)
            now[offset : offset + length] = data
            await source.write(offset, data)

    async def read() -> None:
        for _ in range(60):
            length = rng.randrange(1, 300 * KIB)
            offset = rng.randrange(SIZE - length)
            assert await view.read(offset, length) == content[offset : offset + length]

    await asyncio.gather(write(), read(), read())
    assert await view.read(0, SIZE) == content
    assert await source.read(0, SIZE) == now
    for offset in range(0, SIZE, 64 * KIB):
        changed = now[offset : offset + 64 * KIB] != content[offset : offset + 64 * KIB]
        assert moment.since.is_dirty(offset) or not changed
    moment.close()
    await source.write(0, b"later")
    assert not source.bitmaps


async def test_a_copy_that_fails_costs_the_write_or_the_moment() -> None:
    source, fleece, moment, view = await kept(b"a" * SIZE)
    fleece.failure = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        await source.write(0, b"new")
    assert await source.read(0, 3) == await view.read(0, 3) == b"aaa"
    moment.close()
    source, fleece, moment, view = await kept(b"a" * SIZE, breaks=True)
    fleece.failure = OSError(errno.ENOSPC, "full")
    await source.write(0, b"new")
    assert await source.read(0, 3) == b"new"
    with pytest.raises(OSError, match=r"lost: .*full"):
        await view.read(512 * KIB, 1)
    await source.write(0, b"and on")
    moment.close()


async def test_a_copy_may_take_its_time_and_no_longer() -> None:
    source, fleece, moment, _ = await kept(b"a" * SIZE, timeout=0.01)
    fleece.delay = 5
    with pytest.raises(OSError, match=r"copied in 0\.01 seconds"):
        await source.write(0, b"new")
    assert await source.read(0, 3) == b"aaa"
    moment.close()


async def test_a_moment_is_lost_when_the_disk_is_resized() -> None:
    source, _, moment, view = await kept(b"a" * SIZE)
    await source.resize(2 * SIZE)
    with pytest.raises(OSError, match="the size of the disk has changed"):
        await view.read(0, 1)
    moment.close()
