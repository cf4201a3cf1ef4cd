"""After a power failure the image may be opened by stock tools first. What they take for free space has to be zeroes.

The crash replay of all formats shows that what is read is right in every state. This one goes on from each state as
QEMU does: it puts a block where QEMU would, writes one sector, and looks at what the rest of the block shows.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.formats.vpc import reservations
from nbdserve.formats.vpc.driver import VpcDriver
from tests.formats.vpc.files import qemu_io, same_as_stock
from tests.support.recording import Recorder
from tests.support.replay import Replay
from tests.support.vhd_reader import NONE, blocks_of, read_plainly

BLOCK = 4096
SIZE = 48 * BLOCK


async def used(recorder: Recorder, seed: int) -> None:
    """A new image on a recorded storage, written at random by several clients, and left as it is."""
    rng = random.Random(seed)
    storage = recorder.storage(b"")
    await VpcDriver.create(storage, SIZE, {"block_size": "4k", "force_size": "on"})
    recorder.initial[0] = bytes(storage.content)
    recorder.log.clear()
    node = Node([await VpcDriver.open(storage, {}, read_only=False)])

    async def client() -> None:
        for _ in range(10):
            offset = rng.randrange(SIZE)
            length = min(rng.choice((512, 3000, 9000)), SIZE - offset)
            await node.write(offset, b"D" * length)
            if rng.random() < 0.2:
                await node.flush()

    await asyncio.gather(*(client() for _ in range(2)))


def as_stock_goes_on(data: bytes, number: int) -> bytes:
    """Block ``number``, which is not there, with one sector written, as QEMU 7.2 does it."""
    block, table, bitmaps = blocks_of(data)
    ends = [place * 512 + len(bits) + block for place, bits in zip(table, bitmaps, strict=True) if place != NONE]
    free = max([1536 + -(-len(table) * 4 // 512) * 512, *ends])
    result = bytearray(data).ljust(free + 512 + block + 512, b"\0")
    result[free : free + 512] = b"\xff" * 512
    result[free + 512 + block : free + 512 + block + 512] = data[:512]
    struct.pack_into(">I", result, 1536 + 4 * number, free // 512)
    result[free + 1024 : free + 1536] = b"S" * 512
    return bytes(result)


def states(recorder: Recorder, seed: int, count: int) -> Iterator[bytes]:
    for state in Replay(recorder, None, seed).states(count):
        yield bytes(state.contents[0])


def stale(data: bytes) -> bool:
    """Whether stale bytes become visible when stock tools go on with the image."""
    before = read_plainly(data)
    free = [number for number, place in enumerate(blocks_of(data)[1]) if place == NONE]
    for number in free[:3]:
        expected = bytearray(before)
        expected[number * BLOCK + 512 : number * BLOCK + 1024] = b"S" * 512
        data = as_stock_goes_on(data, number)
        # Their own footer is behind the block: what ours has left further on does not count.
        before = _read_anyhow(data)
        if before != expected:
            return True
    return False


def _read_anyhow(data: bytes) -> bytes:
    return read_plainly(data + data[:512])


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_stale_becomes_visible(seed: int) -> None:
    recorder = Recorder(seed)
    await used(recorder, seed)
    looked_at = 0
    for data in states(recorder, seed, 400):
        assert not stale(data)
        looked_at += 1
    assert looked_at > 200


async def test_the_order_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: table entries that are written, but not stable, before the data."""

    async def unordered(self: reservations.Reservations, pieces: list[tuple[int, bytes]]) -> None:
        await self._storage.write_all(pieces)

    monkeypatch.setattr(reservations.Reservations, "_barrier_entries", unordered)
    found = False
    for seed in range(4):
        recorder = Recorder(seed)
        await used(recorder, seed)
        found = found or any(stale(data) for data in states(recorder, seed, 400))
    assert found


async def test_stock_itself(tmp_path: Path) -> None:
    """qemu-io goes on from some of the states, and what is assumed of it here is so."""
    recorder = Recorder(9)
    await used(recorder, 9)
    path = tmp_path / "a.vhd"
    for data in list(states(recorder, 9, 100))[::12]:
        number = blocks_of(data)[1].index(NONE)
        path.write_bytes(data)
        qemu_io(path, f"write -P {ord('S')} {number * BLOCK + 512} 512")
        assert path.read_bytes() == as_stock_goes_on(data, number)
        expected = bytearray(read_plainly(data))
        expected[number * BLOCK + 512 : number * BLOCK + 1024] = b"S" * 512
        same_as_stock(path, expected)
