"""Every request is counted once, in whichever form it was made."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdserve.block import counting
from nbdserve.block.forms import READ_DATA
from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_TAKEN, WRITE_WAIT
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.block.layers import overlay


async def test_what_is_awaited() -> None:
    node = await overlay(MemoryStorage(b"b" * 64 * KIB, path="base"), 64 * KIB)
    assert node.counters is None
    await node.write(0, b"before")
    counters = counting.begin(node)
    assert counting.begin(node) is counters
    await node.write(4 * KIB, b"x" * 512)
    await node.zero(8 * KIB, KIB)
    await node.read(0, 3 * KIB)
    await node.flush()
    node.unmap = True
    await node.discard(0, 4 * KIB)
    read, write, discard = counters.read, counters.write, counters.discard
    assert (read.operations, read.bytes, read.failed) == (1, 3 * KIB, 0)
    assert (write.operations, write.bytes, counters.highest_end) == (2, 512 + KIB, 9 * KIB)
    assert (discard.operations, discard.bytes, counters.flush.operations) == (1, 4 * KIB, 1)
    assert min(read.time_ns, write.time_ns, discard.time_ns) > 0
    await node.close()


async def test_what_is_not_awaited() -> None:
    storage = MemoryStorage(bytes(64 * KIB))
    node = Node([await RawDriver.open(storage, {}, read_only=False)])
    counters = counting.begin(node)
    buffer = memoryview(bytearray(KIB))
    done: asyncio.Queue[Exception | None] = asyncio.Queue()
    read = node.try_read_into(0, buffer) == READ_DATA
    taken = node.submit_write(KIB, buffer, done.put_nowait)
    if taken == WRITE_TAKEN:
        await done.get()
    assert counters.read.operations == int(read)
    assert counters.write.operations == int(taken != WRITE_WAIT)
    assert node.try_write(4 * KIB, buffer)
    assert (counters.write.operations, counters.highest_end) == (int(taken != WRITE_WAIT) + 1, 5 * KIB)
    async with node.drained():
        assert node.try_read_into(0, buffer) != READ_DATA
    assert counters.read.operations == int(read), "what is not done is not counted"
    assert node.try_read_pieces(0, buffer) is None or counters.read.operations == int(read) + 1
    await node.close()


async def test_what_fails() -> None:
    node = Node([await RawDriver.open(MemoryStorage(bytes(KIB)), {}, read_only=False)])
    counters = counting.begin(node)

    async def broken(offset: int, buffer: memoryview) -> None:
        raise OSError(errno.EIO, "broken")

    node.data.read_into = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="broken"):
        await node.read(0, 512)
    assert (counters.read.operations, counters.read.bytes, counters.read.failed) == (0, 0, 1)
