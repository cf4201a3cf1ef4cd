"""The server as a whole: limits on clients, clients that do not play along, and stopping."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.exports.export import Export, ExportTable
from nbdserve.protocol.constants import CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES
from nbdserve.server.server import Server, ServerLimits
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB
from tests.server.clients import PATIENCE, Client, Gated, Served, open_descriptors, raw, serving
from tests.server.memory import measure

CLIENTS = int(os.environ.get("NBDSERVE_CLIENTS", "100"))
"""How many clients "many" are; 1,000 before a release."""


async def _answers(client: Client) -> bool:
    return (await client.ask(CMD_READ, 0, 1)).error == 0


async def _is_dropped(client: Client) -> bool:
    """Whether the server has ended the connection; what it said before is of no interest."""
    try:
        while await client.receive():
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return False


# --- the handshake is bounded ----------------------------------------------------------------------------------------


UNFINISHED = struct.pack(">IQII", 3, 0x49484156454F5054, 1, 4000) + bytes(3999)
"""An option that lacks a byte."""


async def test_clients_that_do_not_negotiate_hinder_nobody_and_gain_no_time(tmp_path: Path) -> None:
    limits = ServerLimits(handshake_seconds=3600, max_handshakes=10_000)
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), limits=limits) as served:
        slow = [await Client.open(served.path) for _ in range(2 * CLIENTS)]
        await served.until(lambda: len(served.server._negotiating) == len(slow))
        deadlines = dict(served.server._negotiating)
        for at in range(30):
            for client in slow[:CLIENTS]:
                await client.send(UNFINISHED[at : at + 1])
            honest = await served.connect()
            assert await _answers(honest)
            honest.close()
        assert served.server._negotiating == deadlines, "a byte now and then extends nothing"
        assert not any(timer.cancelled() for timer in deadlines.values())
        for client in slow:
            client.close()


async def test_clients_that_do_not_negotiate_are_dropped(tmp_path: Path) -> None:
    limits = ServerLimits(handshake_seconds=0.3, max_handshakes=10_000)
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), limits=limits) as served:
        silent = [await Client.open(served.path) for _ in range(CLIENTS)]
        dripping = [await Client.open(served.path) for _ in range(CLIENTS)]

        async def drip(client: Client) -> None:
            """No single read waits long, and the whole would take minutes."""
            with contextlib.suppress(ConnectionError):
                for byte in UNFINISHED:
                    await client.send(bytes([byte]))
                    await asyncio.sleep(0.06)

        drips = [asyncio.create_task(drip(client)) for client in dripping]
        for client in silent + dripping:
            assert await _is_dropped(client)
        await asyncio.gather(*drips)
        assert not served.server._negotiating
        for client in silent + dripping:
            client.close()


async def test_a_client_in_transmission_has_no_deadline(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096))) as served:
        client = await Client.open(served.path)
        await served.until(lambda: len(served.server._negotiating) == 1)
        (deadline,) = served.server._negotiating.values()
        await client.negotiate()
        assert await _answers(client)
        assert deadline.cancelled()
        client.close()


async def test_the_oldest_negotiation_makes_room_for_the_newest(tmp_path: Path) -> None:
    limits = ServerLimits(max_handshakes=3)
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), limits=limits) as served:
        waiting = []
        for number in range(5):
            waiting.append(await Client.open(served.path))
            await served.until(lambda number=number: len(served.server._negotiating) == min(3, number + 1))  # type: ignore[misc]
            await asyncio.sleep(0.01)
        for client in waiting[:2]:
            assert await _is_dropped(client)
        for client in waiting[2:]:
            await client.negotiate()
            assert await _answers(client)
        assert served.server.connections == 3
        for client in waiting:
            client.close()


async def test_clients_in_transmission_do_not_count_as_negotiating(tmp_path: Path) -> None:
    limits = ServerLimits(max_handshakes=2)
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), limits=limits) as served:
        clients = [await served.connect() for _ in range(10)]
        for client in clients:
            assert await _answers(client)
            client.close()


# --- how many clients ------------------------------------------------------------------------------------------------


async def test_clients_above_the_limit_wait_in_the_backlog(tmp_path: Path) -> None:
    limits = ServerLimits(max_clients=2)
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), limits=limits) as served:
        first, second = await served.connect(), await served.connect()
        waiting = [asyncio.create_task(served.connect()) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        assert served.server.connections == 2
        first.close()
        done, _ = await asyncio.wait(waiting, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        await asyncio.sleep(0.05)
        assert sum(task.done() for task in waiting) == 1
        second.close()
        for task in asyncio.as_completed(waiting, timeout=PATIENCE):
            (await task).close()


@pytest.mark.parametrize("max_clients", [0, 1, 3])
async def test_connecting_and_closing_at_once_leaves_nothing_behind_and_the_server_listening(
    tmp_path: Path, max_clients: int
) -> None:
    limits = ServerLimits(max_clients=max_clients)
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), limits=limits) as served:
        (await served.connect()).close()
        await served.until(lambda: not served.server._clients)
        before = open_descriptors()
        for number in range(1000):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, served.path)
            if number % 3 == 0:
                await asyncio.sleep(0)
            sock.close()
        client = await served.connect()
        assert await _answers(client)
        client.close()
        await served.until(lambda: not served.server._clients and not served.server._negotiating)
        await served.until(lambda: open_descriptors() <= before)


async def test_many_clients_cost_little_and_are_all_answered() -> None:
    figures = await asyncio.to_thread(measure, "clients", str(CLIENTS))
    assert figures["growth"] <= 64 * MIB * CLIENTS / 1000 + 2 * MIB
    assert figures["seconds"] <= 2


@contextlib.contextmanager
def _descriptors_left(count: int) -> Iterator[None]:
    """All descriptors but ``count`` are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 30, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("left", [0, 1, 2, 3, 4, 5])
async def test_running_out_of_descriptors_is_survived(tmp_path: Path, left: int) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), limits=ServerLimits(max_clients=20)) as served:
        old = await served.connect()
        new = []
        for _ in range(6):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            new.append(Client(sock))
        with _descriptors_left(left):
            for client in new:
                await asyncio.get_running_loop().sock_connect(client.sock, served.path)
            await asyncio.sleep(0.1)
            assert await _answers(old)
        served_clients = 0
        for client in new:
            with contextlib.suppress(ConnectionError):
                await client.negotiate()
                assert await _answers(client)
                served_clients += 1
        assert served_clients >= 4, "but for the one or two that were accepted with the last descriptor, all are served"
        for client in [old, *new]:
            client.close()
        await served.until(lambda: not served.server._clients and not served.server._negotiating)
        assert served.server._connecting == 0


# --- stopping --------------------------------------------------------------------------------------------------------


async def test_the_last_client_leaving_is_told_once_and_only_for_clients(tmp_path: Path) -> None:
    left = []
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), on_last_client=lambda: left.append(1)) as served:
        probe = await Client.open(served.path)
        await asyncio.sleep(0.01)
        probe.close()
        first, second = await served.connect(), await served.connect()
        first.close()
        await served.until(lambda: served.server.connections == 1)
        assert left == []
        second.close()
        await served.until(lambda: served.server.connections == 0)
        assert left == [1]


async def test_a_stopped_server_accepts_nobody_and_closes_those_who_negotiate(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096))) as served:
        negotiating = await Client.open(served.path)
        idle = await served.connect()
        await served.until(lambda: len(served.server._negotiating) == 1)
        await asyncio.wait_for(served.server.stop(3600), PATIENCE)
        assert await _is_dropped(negotiating)
        assert await idle.closed()
        late = await Client.open(served.path)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(late.receive(), 0.1)
        for client in (negotiating, idle, late):
            client.close()


async def test_a_client_being_accepted_when_the_server_stops_does_not_get_in(tmp_path: Path) -> None:
    """At every moment of the accepting."""
    for turns in range(8):
        folder = tmp_path / str(turns)
        folder.mkdir()
        async with serving(folder, raw(MemoryStorage(size=4096))) as served:
            client = await Client.open(served.path)
            for _ in range(turns):
                await asyncio.sleep(0)
            await served.server.stop(1)
            await asyncio.sleep(0.02)
            assert not served.server._negotiating
            assert not served.server._clients
            client.close()


async def test_a_client_that_does_not_read_cannot_hold_up_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(b"x" * MIB))) as served:
        client = await served.connect()
        for _ in range(20):
            await client.request(CMD_READ, 0, MIB)
        (connection,) = served.server._clients
        await served.until(lambda: connection._output.backlog > 0)
        began = time.monotonic()
        await asyncio.wait_for(served.server.stop(0.2), PATIENCE)
        assert time.monotonic() - began > 0.15, "it had the time to read"
        await served.until(lambda: served.server.connections == 0)
        client.close()


async def test_a_request_that_never_ends_cannot_hold_up_the_end(tmp_path: Path) -> None:
    storage = Gated(size=4096)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect()
        storage.gate.clear()
        await client.request(CMD_READ, 0, 512)
        await served.until(lambda: storage.waiting == 1)
        await asyncio.wait_for(served.server.stop(0.2), PATIENCE)
        storage.gate.set()
        client.close()


async def test_stopping_and_starting_under_load_loses_no_reply_and_no_descriptor(tmp_path: Path) -> None:
    """Clients in every state while the server stops; each reply that comes is whole, each connection ends."""
    node = raw(Gated(size=4 * MIB), unmap=True)
    before = None
    for number in range(25):
        table = ExportTable()
        table.add(Export("a", node))
        path = str(tmp_path / f"{number}.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(100)
        server = Server(table)
        await server.listen(listener)

        async def load(served: Served, seed: int) -> None:
            rng = random.Random(seed)
            with contextlib.suppress(ConnectionError):
                client = await Client.open(served.path)
                try:
                    if rng.random() < 0.2:
                        await client.receive()
                        await asyncio.sleep(PATIENCE)
                    await client.negotiate()
                    waiting: list[int] = []
                    while True:
                        command = rng.choice((CMD_READ, CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES))
                        length = rng.choice((512, 4096, 100_000))
                        data = b"d" * length if command == CMD_WRITE else b""
                        waiting.append(
                            await client.request(command, rng.randrange(4 * MIB - length), length, data=data)
                        )
                        if len(waiting) > 8:
                            assert (await client.reply(waiting.pop(0))).error in {0, errno.ESHUTDOWN}
                finally:
                    client.close()

        tasks = [asyncio.create_task(load(Served(server, path, listener), seed)) for seed in range(10)]
        await asyncio.sleep(random.Random(number).random() * 0.03)
        await asyncio.wait_for(server.stop(3600), PATIENCE)
        listener.close()
        await asyncio.sleep(0.005)
        for task in tasks:
            if not task.done():
                task.cancel()
        for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE):
            assert result is None or isinstance(result, asyncio.CancelledError), repr(result)
        lock = node.locks.exclusive(0, 4 * MIB)
        await asyncio.wait_for(node.locks.acquire(lock), PATIENCE)
        node.locks.release(lock)
        assert not server._clients
        if number == 3:
            before = open_descriptors()
    most = before
    assert most is not None
    await Served(server, path, listener).until(lambda: open_descriptors() <= most)
