"""The memory of all clients together: counting, queueing, and a server whose clients want more than there is."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.protocol.codec import SIMPLE
from nbdserve.protocol.constants import CMD_CACHE, CMD_READ, CMD_WRITE
from nbdserve.server import budget as budget_module
from nbdserve.server import server as server_module
from nbdserve.server.budget import SMALL, Budget
from nbdserve.server.server import ServerLimits
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.server.clients import Client, Gated, Served, raw, serving
from tests.server.memory import measure

LIMIT = ServerLimits(request_memory=8 * MIB)


async def test_what_is_small_does_not_wait() -> None:
    budget = Budget(MIB)
    assert budget.take(MIB)
    assert budget.take(SMALL)
    assert not budget.take(SMALL + 1)
    assert budget.used == MIB + SMALL


async def test_places_are_granted_in_their_order() -> None:
    budget = Budget(10 * MIB)
    granted: list[str] = []
    assert budget.take(8 * MIB)
    large = budget.queue(9 * MIB, lambda: granted.append("large"))
    next_ = budget.queue(MIB, lambda: granted.append("next"))
    assert not budget.take(MIB), "there is room, and others came first"
    budget.give(7 * MIB)
    assert granted == []
    assert large.granted
    assert not next_.granted
    await asyncio.sleep(0)
    assert granted == ["large"]
    budget.give(9 * MIB)
    await asyncio.sleep(0)
    assert (granted, budget.used) == (["large", "next"], 2 * MIB)
    budget.withdraw(next_)
    assert budget.used == MIB


async def test_what_is_larger_than_the_limit_is_alone() -> None:
    budget = Budget(MIB)
    assert budget.take(2 * MIB)
    assert not budget.take(2 * MIB)
    ticket = budget.queue(2 * MIB, lambda: None)
    budget.give(2 * MIB)
    assert ticket.granted


async def test_who_does_not_wait_any_more_is_not_waited_for() -> None:
    budget = Budget(MIB)
    assert budget.take(MIB)
    waits = asyncio.create_task(budget.wait(MIB))
    behind = asyncio.create_task(budget.wait(512 * KIB))
    await asyncio.sleep(0)
    budget.give(512 * KIB)
    assert [ticket.granted for ticket in budget.waiting] == [False, False]
    waits.cancel()
    await asyncio.wait({waits})
    await behind
    assert (budget.used, len(budget.waiting)) == (MIB, 0)
    late = asyncio.create_task(budget.wait(MIB))
    await asyncio.sleep(0)
    budget.give(MIB)  # granted, and cancelled before it hears of it
    late.cancel()
    await asyncio.wait({late})
    assert budget.used == 0


async def test_scarcity_is_told_as_long_as_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "PATIENCE", 0.02)
    told: list[bool] = []
    budget = Budget(MIB, told.append)
    assert budget.take(MIB)
    ticket = budget.queue(MIB, lambda: None)
    async with asyncio.timeout(60):
        while len(told) < 3:
            await asyncio.sleep(0.001)
        assert told[:3] == [True, False, False]
        budget.withdraw(ticket)
        count = len(told)
        while budget._timer is not None:
            await asyncio.sleep(0.001)
    assert len(told) == count


# --- a server --------------------------------------------------------------------------------------------------------


@contextmanager
def all_given_back(served: Served) -> Iterator[Budget]:
    budget = served.server.buffers.budget
    yield budget
    assert (budget.used, len(budget.waiting)) == (0, 0)


async def test_many_clients_with_large_writes_on_a_storage_that_hangs(tmp_path: Path) -> None:
    storage = Gated(size=64 * MIB)
    async with serving(tmp_path, raw(storage), raw(MemoryStorage(size=MIB)), limits=LIMIT) as served:
        clients = [await served.connect() for _ in range(20)]
        with all_given_back(served) as budget:
            storage.gate.clear()
            writes = [
                asyncio.create_task(client.ask(CMD_WRITE, number * 2 * MIB, data=bytes([number + 1]) * 2 * MIB))
                for number, client in enumerate(clients)
            ]
            await served.until(lambda: storage.waiting > 0 and len(budget.waiting) == 16)
            assert budget.used == 8 * MIB
            # Who asks for little goes on, on this disk and others, one request at a time.
            other, cold = await served.connect("b"), await served.connect()
            assert not (await other.ask(CMD_WRITE, 0, data=b"x" * 100 * KIB)).error
            assert (await other.ask(CMD_READ, 0, 3)).data == b"xxx"
            before = storage.waiting
            small = [await cold.request(CMD_READ, 0, 4096) for _ in range(5)]
            await served.until(lambda: storage.waiting > before)
            await asyncio.sleep(0.05)
            assert storage.waiting == before + 1
            storage.gate.set()
            assert [reply.error for reply in await asyncio.gather(*writes)] == [0] * 20
            for cookie in small:
                assert not (await cold.reply(cookie)).error
            for number, client in enumerate(clients):
                assert (await client.ask(CMD_READ, number * 2 * MIB, 2 * MIB)).data == bytes([number + 1]) * 2 * MIB
        for client in [*clients, other, cold]:
            client.close()


async def test_large_reads_and_prefetches_wait_before_they_take_memory(tmp_path: Path) -> None:
    storage = Gated(b"x" * 4 * MIB)
    async with serving(tmp_path, raw(storage), limits=LIMIT) as served:
        clients = [await served.connect(mode=SIMPLE) for _ in range(6)]
        with all_given_back(served) as budget:
            storage.gate.clear()
            cookies = [await client.request(CMD_READ, 0, 3 * MIB) for client in clients]
            await clients[0].request(CMD_CACHE, 0, 4 * MIB)
            await served.until(lambda: len(budget.waiting) == 5)
            assert (storage.waiting, budget.used) == (2, 6 * MIB)
            storage.gate.set()
            for client, cookie in zip(clients, cookies, strict=True):
                assert (await client.reply(cookie)).data == b"x" * 3 * MIB
            await served.until(lambda: not budget.used)
        for client in clients:
            client.close()


async def test_what_a_client_held_or_waited_for_is_free_when_it_is_gone(tmp_path: Path) -> None:
    storage = Gated(b"x" * 16 * MIB)
    async with serving(tmp_path, raw(storage), limits=LIMIT) as served:
        with all_given_back(served) as budget:
            begun, waits, reads, mute = [await served.connect(mode=SIMPLE) for _ in range(4)]
            _, head = begun.transmission.request(CMD_WRITE, 0, 4 * MIB)
            await begun.send(head + bytes(MIB))
            await served.until(lambda: budget.used == 4 * MIB)
            cookie = await mute.request(CMD_READ, 0, 4 * MIB)
            await served.until(lambda: MIB < budget.used - 4 * MIB < 4 * MIB)
            _, head = waits.transmission.request(CMD_WRITE, 0, 8 * MIB)
            await waits.send(head + bytes(300 * KIB))
            await reads.request(CMD_READ, 0, 8 * MIB)
            await served.until(lambda: len(budget.waiting) == 2)
            waits.close()
            reads.close()
            begun.close()
            # Who only stopped sending may wait for replies.
            await served.until(lambda: served.server.connections == 3)
            assert (await mute.reply(cookie)).data == b"x" * 4 * MIB
            await served.until(lambda: not budget.used)
            mute.close()


async def test_a_server_that_stops_does_not_wait_for_memory(tmp_path: Path) -> None:
    storage = Gated(size=16 * MIB)
    async with serving(tmp_path, raw(storage), limits=LIMIT) as served:
        storage.gate.clear()
        first, second = await served.connect(), await served.connect()
        with all_given_back(served) as budget:
            cookie = await first.request(CMD_WRITE, 0, data=bytes(8 * MIB))
            _, head = second.transmission.request(CMD_WRITE, 0, 4 * MIB)
            await second.send(head + bytes(100 * KIB))
            await served.until(lambda: len(budget.waiting) == 1)
            stopping = asyncio.create_task(served.server.stop(5))
            assert await second.closed()
            storage.gate.set()
            assert not (await first.reply(cookie)).error
            await stopping
        first.close()
        second.close()


async def sends_a_part(client: Client) -> None:
    _, head = client.transmission.request(CMD_WRITE, 0, 8 * MIB)
    await client.send(head + bytes(5 * MIB))


async def does_not_read(client: Client) -> None:
    await client.request(CMD_READ, 0, 8 * MIB)


@pytest.mark.parametrize("holds", [sends_a_part, does_not_read])
async def test_a_client_that_holds_memory_and_does_not_move_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds: object
) -> None:
    monkeypatch.setattr(budget_module, "PATIENCE", 0.1)
    async with serving(tmp_path, raw(Gated(size=16 * MIB)), limits=LIMIT) as served:
        idle, other = await served.connect(mode=SIMPLE), await served.connect()
        with all_given_back(served) as budget:
            await holds(idle)  # type: ignore[operator]
            await served.until(lambda: budget.used > 5 * MIB)
            await asyncio.sleep(0.25)
            assert served.server.connections == 2, "nobody is dropped as long as nobody waits"
            assert not (await other.ask(CMD_WRITE, 0, data=bytes(7 * MIB))).error
            assert served.server.connections == 1
        idle.close()
        other.close()


async def test_a_client_that_moves_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time the server looks who moves, these two have."""
    monkeypatch.setattr(budget_module, "PATIENCE", 3600)
    monkeypatch.setattr(server_module, "_LEAST_MOVED", 64 * KIB)
    async with serving(tmp_path, raw(Gated(size=16 * MIB)), limits=LIMIT) as served:
        slow, reader, other = [await served.connect(mode=SIMPLE) for _ in range(3)]
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        with all_given_back(served) as budget:
            written, head = slow.transmission.request(CMD_WRITE, 0, 4 * MIB)
            await slow.send(head)
            read = await reader.request(CMD_READ, 0, 4 * MIB)
            await served.until(lambda: budget.used > 5 * MIB)
            write = asyncio.create_task(other.ask(CMD_WRITE, 0, data=bytes(8 * MIB)))
            await served.until(lambda: len(budget.waiting) == 1)
            for _ in range(16):
                await slow.send(bytes(256 * KIB))
                taken = 0
                while taken < 192 * KIB and reader.unanswered:
                    taken += len(data := await reader.receive(256 * KIB))
                    reader._take(data)
                budget._scarce()
            assert not (await slow.reply(written)).error
            assert not (await reader.reply(read)).error
            assert not (await write).error
        for client in (slow, reader, other):
            client.close()


def test_memory_stays_within_the_limit() -> None:
    """30 clients that write 4 MiB each to a storage that hangs, of which 32 MiB may be in memory.

    Besides, 16 MiB are kept to be used again, and what a client that waits has sent already is in memory, 256 KiB.
    """
    assert measure("hanging")["growth"] <= 32 * MIB + 16 * MIB + 12 * MIB
