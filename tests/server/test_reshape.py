"""A disk is drained, reshaped and resized under clients that go on: they see one disk or the other, never a mixture."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw import RawDriver
from nbdserve.protocol.codec import EXTENDED, SIMPLE
from nbdserve.protocol.constants import CMD_BLOCK_STATUS, CMD_READ, CMD_WRITE
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import overlay
from tests.server.clients import Client, Gated, raw, serving

SIZE = 64 * KIB


def _letters(letter: str) -> Node:
    storage = MemoryStorage(letter.encode() * SIZE, path=letter)
    return Node([RawDriver(storage, 0, SIZE, read_only=False)])


@pytest.mark.parametrize("length", [512, 40 * KIB], ids=["fast lane", "large"])
async def test_clients_see_an_atomic_swap(tmp_path: Path, length: int) -> None:
    node = _letters("a")
    chains = [list(node.layers), _letters("b").layers]
    seen: list[str] = []

    async def read(client: Client) -> None:
        for _ in range(60):
            cookies = [await client.request(CMD_READ, offset, length) for offset in range(0, SIZE - length, 16 * KIB)]
            for cookie in cookies:
                reply = await client.reply(cookie)
                assert not reply.error
                (letter,) = set(bytes(reply.data))
                seen.append(chr(letter))
            await asyncio.sleep(0)

    async with serving(tmp_path, node) as served:
        clients = [await served.connect(mode=mode) for mode in (SIMPLE, EXTENDED)]
        readers = [asyncio.create_task(read(client)) for client in clients]
        swaps = 0
        while not all(reader.done() for reader in readers):
            async with node.drained():
                await node.reshape(chains[(swaps := swaps + 1) % 2])
                await asyncio.sleep(0)
            await asyncio.sleep(0.001)
        await asyncio.gather(*readers)
        for client in clients:
            client.close()
    assert set(seen) == {"a", "b"}
    assert swaps > 3


async def test_writes_of_the_fast_lane_are_in_one_layer_or_the_other(tmp_path: Path) -> None:
    """Each write holds a number; at the end every block has the last one acknowledged, through all the layers."""
    node = await overlay(None, SIZE)
    expected = dict.fromkeys(range(0, SIZE, 4096), bytes(4096))
    rng = random.Random(7)

    async def write(client: Client, blocks: list[int]) -> None:
        for number in range(1, 120):
            offset = rng.choice(blocks)
            data = number.to_bytes(4, "big") * KIB
            assert not (await client.ask(CMD_WRITE, offset, data=data)).error
            expected[offset] = data
            reply = await client.ask(CMD_READ, offset, 4096)
            assert bytes(reply.data) == data

    async with serving(tmp_path, node) as served:
        clients = [await served.connect() for _ in range(3)]
        blocks = list(expected)
        writers = [asyncio.create_task(write(client, blocks[index::3])) for index, client in enumerate(clients)]
        while not all(writer.done() for writer in writers):
            await asyncio.sleep(0.005)
            upper = await overlay(None, SIZE)
            async with node.drained():
                await node.reshape([upper.top, *node.layers])
        await asyncio.gather(*writers)
        assert len(node.layers) > 3
        for offset, data in expected.items():
            reply = await clients[0].ask(CMD_READ, offset, 4096)
            assert bytes(reply.data) == data
        for client in clients:
            client.close()


async def test_requests_in_flight_finish_and_new_ones_wait(tmp_path: Path) -> None:
    storage = Gated(b"a" * 4096)
    storage.gate.clear()
    node = raw(storage)
    async with serving(tmp_path, node) as served:
        client = await served.connect(contexts=["base:allocation"])
        first = await client.request(CMD_READ, 0, 512)
        await served.until(lambda: storage.waiting == 1)
        entered, leave = asyncio.Event(), asyncio.Event()

        async def swap() -> None:
            async with node.drained():
                entered.set()
                await leave.wait()
                await node.reshape(_letters("b").layers)

        swapping = asyncio.create_task(swap())
        await served.until(lambda: node.gate.closed)
        second = await client.request(CMD_READ, 0, 512)
        write = await client.request(CMD_WRITE, 1024, data=b"w" * 512)
        status = await client.request(CMD_BLOCK_STATUS, 0, 4096)
        await served.until(lambda: not client.sock.getblocking())
        assert not entered.is_set()
        storage.gate.set()
        assert bytes((await client.reply(first)).data) == b"a" * 512
        await entered.wait()
        assert client.unanswered == 3
        leave.set()
        assert bytes((await client.reply(second)).data) == b"b" * 512
        assert not (await client.reply(write)).error
        assert not (await client.reply(status)).error
        await swapping
        assert await node.read(1024, 512) == b"w" * 512
        assert storage.waiting == 0
        client.close()


async def test_a_new_size_is_for_those_who_connect_again(tmp_path: Path) -> None:
    node = raw(MemoryStorage(b"a" * 64 * KIB))
    async with serving(tmp_path, node) as served:
        old = await served.connect()
        await node.resize(128 * KIB)
        new = await served.connect()
        assert (old.export.size, new.export.size) == (64 * KIB, 128 * KIB)
        assert (await old.ask(CMD_READ, 64 * KIB, 512)).error
        assert not (await new.ask(CMD_WRITE, 127 * KIB, data=b"n" * KIB)).error
        await node.resize(32 * KIB)
        for client in (old, new):
            assert (await client.ask(CMD_READ, 48 * KIB, 512)).error
            assert (await client.ask(CMD_WRITE, 48 * KIB, data=b"x" * 512)).error
            assert bytes((await client.ask(CMD_READ, 0, 512)).data) == b"a" * 512
        assert (await served.connect()).export.size == 32 * KIB
        old.close()
        new.close()
    assert node.data.size == 32 * KIB


async def test_a_file_that_leaves_the_chain_is_kept_for_a_client_that_has_not_taken_its_reply(tmp_path: Path) -> None:
    """The descriptor must not be another file's before the reply has left."""
    path = tmp_path / "old.raw"
    path.write_bytes(b"o" * 4 * MIB)
    storage = await FileStorage.open(str(path))
    node = Node([await RawDriver.open(storage, {}, read_only=False)])
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        cookies = [await client.request(CMD_READ, number * MIB, MIB) for number in range(4)]
        await asyncio.sleep(0.05)  # the socket is full, and the rest of the replies is queued
        old = node.layers
        image = MemoryStorage(path="new")
        await Qcow2Driver.create(image, 4 * MIB, {})
        async with node.drained():
            await node.reshape([await Qcow2Driver.open(image, {}, read_only=False)])
        await old[0].close()
        others = [os.open(tmp_path / f"other{number}", os.O_RDWR | os.O_CREAT) for number in range(8)]
        for other in others:
            os.truncate(other, 4 * MIB)
            os.pwrite(other, b"X" * MIB, 0)
        for cookie in cookies:
            data = bytes((await client.reply(cookie)).data)
            assert data in (b"o" * MIB, bytes(MIB))
        client.close()
        for other in others:
            os.close(other)
        await served.until(lambda: storage._fd == -1)
