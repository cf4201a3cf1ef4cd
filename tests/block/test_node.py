"""A node: the chain as one disk, in both forms of each request."""

from __future__ import annotations

import asyncio
import errno
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.node import (
    MAX_SYNC_PIECES,
    READ_DATA,
    READ_SPLIT,
    READ_WAIT,
    READ_ZERO,
    Node,
)
from nbdserve.block.pieces import zero_pieces
from nbdserve.block.writer import WRITE_DONE, WRITE_WAIT
from nbdserve.errors import RequestError
from nbdserve.extents import DATA
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import CLUSTER, Scripted, guest, overlay, raw_node
from tests.block.test_chain import chains


def _never(error: Exception | None) -> None:
    raise AssertionError("a write that was not taken has ended")


def _buffer(length: int) -> memoryview:
    return memoryview(bytearray(b"\xee" * length))


@given(chains, st.data())
async def test_both_forms_of_a_read_give_the_guest_content(layers: list[Scripted], data: st.DataObject) -> None:
    node, content = Node(layers), guest(layers)
    start = data.draw(st.integers(0, node.size - 1))
    end = data.draw(st.integers(start + 1, node.size))
    expected = content[start:end]

    buffer = _buffer(end - start)
    await node.read_into(start, buffer)
    assert buffer == expected
    assert await node.read(start, end - start) == expected

    buffer = _buffer(end - start)
    outcome = node.try_read_into(start, buffer)
    if outcome == READ_DATA:
        assert buffer == expected
    elif outcome == READ_ZERO:
        assert not any(expected)
        assert buffer == _buffer(end - start), "a zero range is not touched"
    elif outcome == READ_SPLIT:
        pieces = node.try_read_pieces(start, buffer)
        if pieces is None:
            assert any("C" in layer.clusters for layer in layers), "only compressed clusters have to wait here"
        else:
            assert sum(length for _, length in pieces) == end - start
            assert all(first[0] != second[0] for first, second in pairwise(pieces))
            zero_pieces(buffer, pieces)
            assert buffer == expected
    else:
        assert outcome == READ_WAIT


@pytest.mark.parametrize(
    ("clusters", "below", "offset", "length", "outcome"),
    [
        ("DD", "..", 0, 4, READ_DATA),
        ("..", "DD", 1, 3, READ_DATA),
        ("Z.", "D.", 0, 4, READ_ZERO),
        ("..", "..", 0, 4, READ_ZERO),
        ("CC", "..", 0, 4, READ_WAIT),
        ("DZ", "..", 0, 8, READ_SPLIT),
        ("...", "D", 0, 12, READ_SPLIT),
    ],
)
def test_what_the_first_attempt_tells(clusters: str, below: str, offset: int, length: int, outcome: int) -> None:
    node = Node([Scripted(clusters, "a"), Scripted(below, "b")])
    assert node.try_read_into(offset, _buffer(length)) == outcome


async def test_a_table_that_is_missing_is_waited_for_and_loaded_once() -> None:
    layer = Scripted("DDDD", "a", loaded=False)
    node = Node([layer])
    assert node.try_read_into(0, _buffer(4)) == READ_WAIT
    assert await node.read(0, 16) == b"a" * 16
    assert layer.loads == [0, 8]
    assert node.try_read_into(0, _buffer(4)) == READ_DATA


def test_a_read_of_very_many_pieces_is_left_to_a_task() -> None:
    node = Node([Scripted("DZ" * MAX_SYNC_PIECES, "a")])
    assert node.try_read_pieces(0, _buffer(MAX_SYNC_PIECES * CLUSTER)) is not None
    assert node.try_read_pieces(0, _buffer(2 * MAX_SYNC_PIECES * CLUSTER)) is None


async def test_a_storage_that_would_block_makes_the_read_wait() -> None:
    class Cold(MemoryStorage):
        def try_read_into(self, offset: int, buffer: memoryview) -> bool:
            buffer[:] = b"\xdb" * len(buffer)
            return False

        async def read_into(self, offset: int, buffer: memoryview) -> None:
            super().try_read_into(offset, buffer)

    node = await raw_node(Cold(b"x" * 1024))
    assert node.try_read_into(0, _buffer(512)) == READ_WAIT
    assert node.try_read_pieces(0, _buffer(512)) is None
    assert await node.read(0, 1024) == b"x" * 1024


async def test_requests_of_length_zero_are_served_up_to_the_very_end() -> None:
    for node in (
        await raw_node(MemoryStorage(bytes(8192)), unmap=True, detect_zeroes="on"),
        await overlay(None, 2 * MIB, unmap=True, detect_zeroes="unmap"),
    ):
        for offset in (0, 512, node.size):
            assert await node.read(offset, 0) == b""
            assert node.try_read_pieces(offset, _buffer(0)) == []
            await node.write(offset, b"", fua=True)
            await node.zero(offset, 0)
            await node.discard(offset, 0)
            await node.cache(offset, 0)


async def test_a_write_that_needs_more_than_the_bytes_is_not_tried() -> None:
    storage = MemoryStorage(bytes(8192))
    plain = await raw_node(storage)
    assert plain.submit_write(100, memoryview(b"hello"), _never) == WRITE_DONE
    assert await plain.read(100, 5) == b"hello"
    for policy in ({"writethrough": True}, {"guard_probed_raw": True}, {"detect_zeroes": "on"}):
        node = await raw_node(storage, **policy)
        assert node.submit_write(100, memoryview(b"HELLO"), _never) == WRITE_WAIT
    read_only = Node([RawDriver(storage, 0, 8192, read_only=True)])
    assert read_only.submit_write(100, memoryview(b"HELLO"), _never) == WRITE_WAIT
    assert await plain.read(100, 5) == b"hello"


async def test_a_write_that_needs_one_look_is_complete_at_once() -> None:
    node = await overlay(None, MIB)
    await node.write(4096, b"x" * 8192)
    data = memoryview(b"y" * 8193)
    assert node.submit_write(4096, data[:8192], _never) == WRITE_DONE, "in place"
    assert node.submit_write(4096, data, _never) == WRITE_WAIT, "in place and beyond"
    assert node.submit_write(4095, data[:2], _never) == WRITE_WAIT
    assert node.submit_write(100, data[:1], _never) == WRITE_DONE, "a new cluster"
    assert await node.read(4095, 8194) == b"\0" + b"y" * 8192 + b"\0"
    assert await node.read(0, 4096) == bytes(100) + b"y" + bytes(3995)
    assert not (await node.top.check()).corruptions


async def test_only_data_that_stays_in_its_place_is_sent_from_there() -> None:
    storage = MemoryStorage(bytes(8192), path="base.raw")
    raw = await raw_node(storage)
    assert raw.locate_read(512, 1024) == (storage, 512)
    node = await overlay(storage, 8192)
    assert node.locate_read(512, 1024) == (storage, 512), "a backing file does not change"
    await node.write(0, b"x" * 4096)
    assert node.locate_read(512, 1024) is None, "a cluster may be freed and used for another block"
    assert node.locate_read(4000, 200) is None


async def test_closing_waits_for_the_requests_in_flight() -> None:
    node = await raw_node(MemoryStorage(bytes(512)))
    lock = node.locks.shared(0, 512)
    assert node.locks.try_acquire(lock)
    closing = asyncio.create_task(node.close())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()
    node.locks.release(lock)
    await asyncio.wait_for(closing, 60)


async def test_reshape_exchanges_the_layers_and_all_that_was_remembered_of_them() -> None:
    base = MemoryStorage(b"b" * 64 * KIB, path="base")
    node = await overlay(base, 64 * KIB)
    await node.write(0, b"one!" * KIB)
    for _ in range(2):  # the place is remembered, for reading and for writing
        assert node.try_read_into(0, _buffer(512)) == READ_DATA
        assert node.submit_write(0, memoryview(b"one!"), _never) == WRITE_DONE
    below = node.layers
    upper = await overlay(None, 64 * KIB)
    async with node.drained():
        await node.reshape([upper.top, *below])
    assert node.is_stable
    assert node.top is upper.top
    assert (await node.read(0, 4096), await node.read(8192, 4)) == (b"one!" * KIB, b"bbbb")
    await node.write(0, b"two!" * KIB)
    await node.write(4096, b"two!" * KIB)
    assert await node.read(0, 8192) == b"two!" * 2 * KIB
    assert await Node(below).read(0, 8192) == b"one!" * KIB + b"b" * 4096, "the old top is written no more"
    async with node.drained():
        await node.reshape(below)
    buffer = _buffer(8)
    assert node.try_read_into(4092, buffer) != READ_DATA or buffer == b"one!bbbb"
    assert await node.read(4092, 8) == b"one!bbbb"


async def test_reshape_flushes_what_leaves_the_top_or_changes_nothing() -> None:
    class Unstable(MemoryStorage):
        async def flush(self) -> None:
            raise OSError(errno.EIO, "lost")

    node = await raw_node(Unstable(bytes(4096)))
    layers = node.layers
    upper = await overlay(None, 4096)
    await node.write(0, b"x")
    with pytest.raises(OSError, match="lost"):
        async with node.drained():
            await node.reshape([upper.top, *layers])
    assert node.layers == layers


async def test_a_disk_that_shrinks_refuses_what_lies_outside_and_takes_it_again_when_it_grows() -> None:
    node = await raw_node(MemoryStorage(b"x" * 16 * KIB))
    assert node.try_read_into(12 * KIB, _buffer(512)) == READ_DATA
    assert node.submit_write(12 * KIB, _buffer(512), _never) == WRITE_DONE
    await node.resize(8 * KIB)
    assert node.size == 8 * KIB
    for offset in (12 * KIB, 8 * KIB - 256):
        assert node.try_read_into(offset, _buffer(512)) == READ_WAIT
        assert node.try_read_pieces(offset, _buffer(512)) is None
        assert node.locate_read(offset, 512) is None
        assert node.submit_write(offset, _buffer(512), _never) == WRITE_WAIT
        for request in (node.read(offset, 512), node.write(offset, bytes(512)), node.zero(offset, 512)):
            with pytest.raises(RequestError, match="not inside"):
                await request
    assert node.try_read_into(0, _buffer(512)) == READ_DATA
    assert node.submit_write(0, _buffer(512), _never) == WRITE_DONE
    await node.resize(32 * KIB)
    assert await node.read(8 * KIB, 24 * KIB) == bytes(24 * KIB)
    assert node.submit_write(31 * KIB, _buffer(512), _never) == WRITE_DONE


async def test_a_resize_that_fails_halfway_or_is_cancelled_leaves_the_size_that_the_image_has() -> None:
    halfway, go_on = asyncio.Event(), asyncio.Event()

    class Halfway(RawDriver):
        async def resize(self, size: int) -> None:
            await super().resize(size)
            halfway.set()
            await go_on.wait()
            raise OSError(errno.EIO, "failed")

    node = Node([await Halfway.open(MemoryStorage(bytes(16 * KIB)), {}, read_only=False)])
    resizing = asyncio.create_task(node.resize(8 * KIB))
    await halfway.wait()
    resizing.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await resizing
    assert node.size == node.top.size == 8 * KIB
    with pytest.raises(OSError, match="failed"):
        await node.resize(4 * KIB)
    assert node.size == node.top.size == 4 * KIB
    with pytest.raises(RequestError, match="not inside"):
        await node.write(4 * KIB, bytes(512))


async def test_a_bitmap_grows_before_the_zeroes_over_a_longer_layer_are_marked() -> None:
    base = MemoryStorage(b"b" * MIB, path="base")
    node = await overlay(base, 32 * KIB)
    bitmap = node.bitmaps.add("b", 4096)
    await node.resize(MIB)
    assert await node.read(0, MIB) == b"b" * 32 * KIB + bytes(MIB - 32 * KIB)
    assert bitmap.size == MIB
    assert bitmap.count() == MIB - 32 * KIB


async def test_growing_above_a_longer_layer_shows_zeroes_and_not_that_layer() -> None:
    class Growing(Qcow2Driver):
        async def resize(self, size: int) -> None:
            self.size = size

    class Failing(Growing):
        def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
            raise OSError(errno.ENOSPC, "full")

    for driver in (Growing, Failing):
        image = MemoryStorage(path="top")
        options = {"cluster_size": "4096", "backing_file": "base", "backing_fmt": "raw"}
        await Qcow2Driver.create(image, 64 * KIB, options)
        top = await driver.open(image, {}, read_only=False)
        # A table of the largest size has room for the larger disk, so that its header alone says how large it is.
        top.size = 32 * KIB
        base = MemoryStorage(b"b" * 48 * KIB, path="base")
        node = Node([top, RawDriver(base, 0, base.size, read_only=True)])
        if driver is Failing:
            with pytest.raises(OSError, match="full"):
                await node.resize(64 * KIB)
            assert node.size == top.size == 32 * KIB
        else:
            await node.resize(64 * KIB)
            assert await node.read(0, 64 * KIB) == b"b" * 32 * KIB + bytes(32 * KIB)


async def test_the_unit_a_disk_ends_in_is_its_own_before_the_disk_grows_above_a_longer_layer() -> None:
    """The power may fail right after the new size is on disk."""
    image = MemoryStorage(path="top")
    options = {"cluster_size": "4096", "backing_file": "base", "backing_fmt": "raw"}
    await Qcow2Driver.create(image, 5 * KIB, options)
    top = await Qcow2Driver.open(image, {}, read_only=False)
    base = MemoryStorage(b"b" * 48 * KIB, path="base")
    below = RawDriver(base, 0, base.size, read_only=True)
    top.accept_backing(below)
    node, seen = Node([top, below]), []

    def tell(size: int) -> None:
        run = top.lookup(4 * KIB, 4 * KIB)
        assert run is not None
        seen.append((size, run[0]))

    resize = top.resize

    async def telling(size: int) -> None:
        tell(size)
        await resize(size)

    top.resize = telling  # type: ignore[method-assign]
    await node.resize(64 * KIB)
    assert seen == [(64 * KIB, DATA)]
    assert await node.read(0, 64 * KIB) == b"b" * 5 * KIB + bytes(59 * KIB)
