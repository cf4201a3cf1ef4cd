"""BLOCK_STATUS over the wire: all contexts of a request cover the same range, and tell the truth."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.node import Node
from nbdserve.exports.export import Export
from nbdserve.protocol.codec import EXTENDED, STRUCTURED
from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_READ,
    CMD_WRITE,
    EXTENDED_REQUEST_MAGIC,
    MAX_EXTENTS,
)
from nbdserve.storage.memory import PAGE_SIZE, MemoryStorage
from nbdserve.units import GIB, KIB, TIB
from tests.block.layers import Scripted, overlay
from tests.server.clients import Client, Served, raw, serving

ALLOCATION, DEPTH = "base:allocation", "qemu:allocation-depth"
ZEROES = 3
MODES = pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED], ids=["structured", "extended"])


def _export(node: Node) -> Export:
    return Export("a", node, allocation_depth=True)


async def _connect(served: Served, mode: int, *contexts: str) -> Client:
    client = await served.connect(mode=mode, contexts=contexts)
    assert sorted(name for _, name in client.export.contexts) == sorted(contexts)
    return client


async def _status(client: Client, offset: int, length: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
    reply = await client.ask(CMD_BLOCK_STATUS, offset, length, flags=flags)
    assert not reply.error, reply.message
    names = dict(client.export.contexts)
    return {names[number]: extents for number, extents in reply.extents.items()}


async def _two_layers() -> Node:
    base = MemoryStorage(size=256 * KIB, path="base.raw")
    await base.write(64 * KIB, b"b" * 64 * KIB)
    node = await overlay(base, 320 * KIB, cluster_size=64 * KIB)
    await node.write(128 * KIB, b"t")
    return node


@MODES
async def test_both_contexts_are_answered_for_one_range(tmp_path: Path, mode: int) -> None:
    async with serving(tmp_path, _export(await _two_layers())) as served:
        client = await _connect(served, mode, ALLOCATION, DEPTH)
        assert await _status(client, 0, 320 * KIB) == {
            ALLOCATION: [(64 * KIB, ZEROES), (128 * KIB, 0), (128 * KIB, ZEROES)],
            DEPTH: [(128 * KIB, 2), (64 * KIB, 1), (64 * KIB, 2), (64 * KIB, 0)],
        }
        assert await _status(client, 64 * KIB + 1, 100) == {ALLOCATION: [(100, 0)], DEPTH: [(100, 2)]}
        client.close()


@MODES
async def test_one_extent_is_one_extent_in_each_and_both_end_together(tmp_path: Path, mode: int) -> None:
    async with serving(tmp_path, _export(await _two_layers())) as served:
        client = await _connect(served, mode, ALLOCATION, DEPTH)
        position = 0
        seen = []
        while position < 320 * KIB:
            found = await _status(client, position, 320 * KIB - position, CMD_FLAG_REQ_ONE)
            assert [len(extents) for extents in found.values()] == [1, 1]
            (length, flags), (other, depth) = found[ALLOCATION][0], found[DEPTH][0]
            assert length == other
            seen.append((length // KIB, flags, depth))
            position += length
        assert seen == [(64, ZEROES, 2), (64, 0, 2), (64, 0, 1), (64, ZEROES, 2), (64, ZEROES, 0)]
        client.close()


@pytest.mark.parametrize("context", [ALLOCATION, DEPTH])
async def test_one_context_alone(tmp_path: Path, context: str) -> None:
    async with serving(tmp_path, _export(await _two_layers())) as served:
        client = await _connect(served, EXTENDED, context)
        assert list(await _status(client, 0, 320 * KIB)) == [context]
        client.close()


async def test_a_payload_selects_contexts(tmp_path: Path) -> None:
    async with serving(tmp_path, _export(await _two_layers())) as served:
        client = await _connect(served, EXTENDED, ALLOCATION, DEPTH)
        ids = {name: number for number, name in client.export.contexts}
        reply = await client.ask(CMD_BLOCK_STATUS, 0, 320 * KIB, only=[ids[DEPTH]])
        assert list(reply.extents) == [ids[DEPTH]]
        reply = await client.ask(CMD_BLOCK_STATUS, 0, 320 * KIB, only=[ids[DEPTH], ids[ALLOCATION]])
        assert len(reply.extents) == 2
        for offset, length, only in (
            (0, 320 * KIB, [ids[DEPTH], 77]),
            (0, 320 * KIB, [ids[DEPTH]] * 2),
            (0, 320 * KIB + 1, [ids[DEPTH]]),
            (0, 1 << 63, [ids[DEPTH]]),
            (1, 0, [ids[DEPTH]]),
        ):
            reply = await client.ask(CMD_BLOCK_STATUS, offset, length, only=only)
            assert reply.error == errno.EINVAL, (offset, length, only)
        cookie, _ = client.transmission.request(CMD_BLOCK_STATUS, 0, 1)
        head = struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, CMD_FLAG_PAYLOAD_LEN, CMD_BLOCK_STATUS, cookie, 0, 11)
        await client.send(head + b"x" * 11)
        assert (await client.reply(cookie)).error == errno.EINVAL
        assert not (await client.ask(CMD_READ, 0, 512)).error
        client.close()


async def test_ten_terabytes_are_one_extent_with_64_bit_lengths_and_cut_with_32(tmp_path: Path) -> None:
    storage = MemoryStorage(size=10 * TIB)
    await storage.write(5 * GIB, b"x")
    async with serving(tmp_path, _export(raw(storage))) as served:
        client = await _connect(served, EXTENDED, ALLOCATION, DEPTH)
        found = await _status(client, 0, 10 * TIB)
        assert found[ALLOCATION] == [(5 * GIB, ZEROES), (PAGE_SIZE, 0), (5 * TIB * 2 - 5 * GIB - PAGE_SIZE, ZEROES)]
        assert sum(length for length, _ in found[DEPTH]) == 10 * TIB
        client.close()

        client = await _connect(served, STRUCTURED, ALLOCATION)
        position, extents = 0, []
        while position < 6 * GIB:
            request = min(0xFFFFFFFF, 6 * GIB - position)
            for length, status in (await _status(client, position, request))[ALLOCATION]:
                assert length % 512 == 0, "no extent ends inside a sector"
                extents.append((position, length, status))
                position += length
        assert position == 6 * GIB
        assert [(at, size) for at, size, status in extents if status == 0] == [(5 * GIB, PAGE_SIZE)]
        client.close()


async def test_a_list_as_long_as_allowed_is_cut_there(tmp_path: Path) -> None:
    layer = Scripted("DZ" * MAX_EXTENTS, "a")
    layer.batch = 4096
    async with serving(tmp_path, _export(Node([layer]))) as served:
        client = await _connect(served, EXTENDED, ALLOCATION, DEPTH)
        found = await _status(client, 0, layer.size)
        assert len(found[ALLOCATION]) == MAX_EXTENTS
        assert sum(length for length, _ in found[ALLOCATION]) == sum(length for length, _ in found[DEPTH])
        client.close()


async def test_without_a_context_block_status_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096))) as served:
        client = await served.connect()
        assert (await client.ask(CMD_BLOCK_STATUS, 0, 4096)).error == errno.EINVAL
        assert not (await client.ask(CMD_READ, 0, 512)).error
        client.close()


@MODES
async def test_ranges_outside_the_export_are_refused(tmp_path: Path, mode: int) -> None:
    async with serving(tmp_path, _export(raw(MemoryStorage(size=4096)))) as served:
        client = await _connect(served, mode, ALLOCATION)
        for offset, length in ((0, 0), (0, 4097), (4096, 1), (1 << 63, 1)):
            assert (await client.ask(CMD_BLOCK_STATUS, offset, length)).error == errno.EINVAL
        client.close()


def _with_bitmaps(node: Node) -> Export:
    """A recording bitmap, and a coarser one of a smaller disk that is dirty at its end."""
    node.bitmaps.add("now", 4 * KIB)
    old = DirtyBitmap("old", 100 * KIB)
    old.set(64 * KIB, 1)
    return Export("a", node, bitmaps=[node.bitmaps.get("now"), old])


@MODES
async def test_bitmaps_are_answered_with_the_rest_for_one_range(tmp_path: Path, mode: int) -> None:
    now, old = "qemu:dirty-bitmap:now", "qemu:dirty-bitmap:old"
    node = await _two_layers()
    async with serving(tmp_path, _with_bitmaps(node)) as served:
        client = await _connect(served, mode, ALLOCATION, now, old)
        assert dict(client.export.contexts) == {0: ALLOCATION, 2: now, 3: old}
        reply = await client.ask(CMD_WRITE, 10 * KIB, data=b"x" * 3 * KIB)
        assert not reply.error
        found = await _status(client, 0, 320 * KIB)
        assert found[now] == [(8 * KIB, 0), (8 * KIB, 1), (304 * KIB, 0)]
        assert found[old] == [(64 * KIB, 0), (36 * KIB, 1), (220 * KIB, 0)]
        assert {sum(length for length, _ in extents) for extents in found.values()} == {320 * KIB}
        assert await _status(client, 9 * KIB, 320 * KIB - 9 * KIB, CMD_FLAG_REQ_ONE) == {
            ALLOCATION: [(7 * KIB, 0)],
            now: [(7 * KIB, 1)],
            old: [(7 * KIB, 0)],
        }
        client.close()


async def test_a_full_bitmap_cuts_all_answers(tmp_path: Path) -> None:
    node = raw(MemoryStorage(size=2 * MAX_EXTENTS * KIB))
    bitmap = node.bitmaps.add("b", 512)
    for at in range(0, node.size, KIB):
        bitmap.set(at, 1)
    async with serving(tmp_path, Export("a", node, bitmaps=[bitmap])) as served:
        client = await _connect(served, EXTENDED, ALLOCATION, "qemu:dirty-bitmap:b")
        found = await _status(client, 0, node.size)
        assert len(found["qemu:dirty-bitmap:b"]) == MAX_EXTENTS
        assert found[ALLOCATION] == [(MAX_EXTENTS * 512, ZEROES)]
        client.close()


async def test_a_bitmap_alone(tmp_path: Path) -> None:
    node = await _two_layers()
    async with serving(tmp_path, _with_bitmaps(node)) as served:
        client = await _connect(served, EXTENDED, "qemu:dirty-bitmap:old")
        assert await _status(client, 100 * KIB, 100 * KIB) == {"qemu:dirty-bitmap:old": [(100 * KIB, 0)]}
        client.close()
