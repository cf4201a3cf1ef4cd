"""Draining: nothing is in flight, nothing begins, and whoever drains may go on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextvars import copy_context

import pytest

from nbdserve.block.drain import drained
from nbdserve.block.forms import READ_DATA, READ_WAIT
from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT
from nbdserve.errors import RequestError
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.block.layers import raw_node


class Slow(MemoryStorage):
    """Every operation waits for ``gate``; ``asked`` counts them."""

    def __init__(self, size: int) -> None:
        super().__init__(bytes(size), path="slow")
        self.gate = asyncio.Event()
        self.asked = 0

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return False

    async def _pass(self) -> None:
        self.asked += 1
        await self.gate.wait()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._pass()
        super().try_read_into(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await self._pass()
        super().try_write(offset, data)

    async def flush(self) -> None:
        await self._pass()


async def _soon() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def _never(error: Exception | None) -> None:
    raise AssertionError("it was not taken")


async def _drain(node: Node, entered: asyncio.Event, leave: asyncio.Event) -> None:
    async with node.drained():
        entered.set()
        await leave.wait()


@pytest.mark.parametrize("kind", ["read", "write", "submitted write", "flush"])
async def test_what_is_in_flight_finishes_first_and_what_is_new_waits(kind: str) -> None:
    storage = Slow(4 * KIB)
    node = await raw_node(storage)
    done = asyncio.get_running_loop().create_future()
    first: Awaitable[object]
    if kind == "read":
        first = asyncio.ensure_future(node.read(0, 512))
    elif kind == "write":
        first = asyncio.ensure_future(node.write(0, b"x" * 512))
    elif kind == "flush":
        node.changes += 1
        first = asyncio.ensure_future(node.flush())
    else:
        first = done
        assert node.submit_write(0, memoryview(b"x" * 512), done.set_result) == WRITE_TAKEN
    await _soon()
    assert storage.asked == 1
    entered, leave = asyncio.Event(), asyncio.Event()
    drain = asyncio.ensure_future(_drain(node, entered, leave))
    await _soon()
    assert not entered.is_set()
    late = asyncio.ensure_future(node.read(512, 512))
    await _soon()
    assert storage.asked == 1, "what came after the drain began is not begun"
    storage.gate.set()
    await first
    await entered.wait()
    await _soon()
    assert not late.done()
    leave.set()
    await late
    await drain


async def test_nothing_is_answered_at_once_while_drained() -> None:
    node = await raw_node(MemoryStorage(b"x" * 4096))
    buffer = memoryview(bytearray(512))
    async with node.drained():
        assert node.try_read_into(0, buffer) == READ_WAIT
        assert node.try_read_pieces(0, buffer) is None
        assert node.locate_read(0, 512) is None
        assert node.submit_write(0, buffer, _never) == WRITE_WAIT
    assert node.try_read_into(0, buffer) == READ_DATA
    assert node.locate_read(0, 512) is not None
    assert node.submit_write(0, buffer, _never) == WRITE_DONE


async def test_who_drains_uses_the_node_and_so_do_its_tasks() -> None:
    node = await raw_node(MemoryStorage(b"x" * 4096))
    async with node.drained(), asyncio.timeout(60):
        await node.write(0, b"y" * 512)
        await node.flush()
        assert await asyncio.create_task(node.read(0, 512)) == b"y" * 512
        async with node.drained():
            await node.zero(0, 512)
        assert node.try_read_into(0, memoryview(bytearray(512))) == READ_WAIT, "the inner one has not opened the gate"


async def test_a_task_started_while_drained_has_to_wait_the_next_time() -> None:
    node = await raw_node(MemoryStorage(b"x" * 4096))
    again, go = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await node.read(0, 512)
        again.set()
        await go.wait()
        await node.read(0, 512)

    async with node.drained():
        task = asyncio.create_task(work())
        await again.wait()
    async with node.drained():
        go.set()
        await _soon()
        assert not task.done()
    await task


async def test_two_who_drain_take_turns() -> None:
    node = await raw_node(MemoryStorage(b"x" * 4096))
    entered, leave = [asyncio.Event(), asyncio.Event()], [asyncio.Event(), asyncio.Event()]
    tasks = [asyncio.create_task(_drain(node, entered[index], leave[index])) for index in range(2)]
    await entered[0].wait()
    await _soon()
    assert not entered[1].is_set()
    leave[0].set()
    await entered[1].wait()
    assert node.try_read_into(0, memoryview(bytearray(512))) == READ_WAIT
    leave[1].set()
    await asyncio.gather(*tasks)
    assert node.try_read_into(0, memoryview(bytearray(512))) == READ_DATA


async def test_a_drain_that_is_given_up_lets_everybody_go_on() -> None:
    storage = Slow(4096)
    node = await raw_node(storage)
    read = asyncio.create_task(node.read(0, 512))
    await _soon()
    drain = asyncio.create_task(_drain(node, asyncio.Event(), asyncio.Event()))
    await _soon()
    late = asyncio.create_task(node.read(512, 512))
    drain.cancel()
    await asyncio.wait([drain])
    storage.gate.set()
    async with asyncio.timeout(60):
        await read
        await late
        async with node.drained():
            pass


async def test_a_request_that_is_given_up_at_the_gate_is_forgotten() -> None:
    node = await raw_node(MemoryStorage(b"x" * 4096))
    outside = copy_context()
    async with node.drained():
        read = asyncio.get_running_loop().create_task(node.read(0, 512), context=outside)
        await _soon()
        assert not read.done()
        read.cancel()
        await asyncio.wait([read])
    assert node.gate.inside == 0


async def test_several_at_once_in_one_order() -> None:
    nodes = [await raw_node(MemoryStorage(b"x" * 4096)) for _ in range(3)]
    busy = 0

    async def drain_all(order: list[Node]) -> None:
        nonlocal busy
        for _ in range(5):
            async with drained(*order):
                busy += 1
                assert busy == 1
                assert all(node.gate.closed for node in nodes)
                await asyncio.sleep(0)
                busy -= 1

    async with asyncio.timeout(60):
        await asyncio.gather(drain_all(nodes), drain_all(nodes[::-1]), drain_all([nodes[1], nodes[0], nodes[2]]))
    assert not any(node.gate.closed for node in nodes)


async def test_what_fails_inside_opens_the_gate() -> None:
    node = await raw_node(MemoryStorage(b"x" * 4096))
    with pytest.raises(RequestError):
        async with drained(node):
            await node.read(4096, 1)
    assert node.try_read_into(0, memoryview(bytearray(512))) == READ_DATA
