"""One client from connect to close: handshake, the change into transmission, and ends of every kind."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdserve.errors import OptionError
from nbdserve.exports.export import Export
from nbdserve.protocol.codec import SIMPLE
from nbdserve.protocol.constants import (
    CMD_READ,
    IHAVEOPT,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_LIST,
    REP_ERR_POLICY,
    REP_ERR_UNKNOWN,
)
from nbdserve.server import connection
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.server.clients import Client, old_style, raw, read_exactly, serving, simple_request


def _option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">QII", IHAVEOPT, number, len(data) if length is None else length) + data


async def test_the_server_speaks_first(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096))) as served:
        client = await Client.open(served.path)
        assert await read_exactly(client.sock, 18) == struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 3)
        client.close()


async def test_each_export_is_found_by_its_name(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), raw(MemoryStorage(size=8192))) as served:
        for name, size in (("a", 4096), ("b", 8192), ("", 4096)):
            client = await served.connect(name)
            assert client.export.size == size
            client.close()
        with pytest.raises(OptionError) as caught:
            await served.connect("c")
        assert caught.value.reply == REP_ERR_UNKNOWN


async def test_requests_sent_with_the_last_option_are_answered(tmp_path: Path) -> None:
    """A client may send on without waiting; all of it can arrive in one piece, or byte by byte."""
    async with serving(tmp_path, raw(MemoryStorage(b"x" * 4096))) as served:
        stream = struct.pack(">I", 3) + _option(OPT_EXPORT_NAME, b"a")
        stream += simple_request(CMD_READ, 1, 0, 4) + simple_request(CMD_READ, 2, 4, 4)
        for step in (len(stream), 1, 7):
            client = await Client.open(served.path)
            for start in range(0, len(stream), step):
                await client.send(stream[start : start + step])
                if step < len(stream):
                    await asyncio.sleep(0)
            await read_exactly(client.sock, 18 + 10)
            replies = await read_exactly(client.sock, 2 * 20)
            assert replies[8:20] == struct.pack(">Q", 1) + b"xxxx"
            assert replies[28:40] == struct.pack(">Q", 2) + b"xxxx"
            client.close()


async def test_a_client_that_aborts_is_answered_and_closed(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096))) as served:
        client = await Client.open(served.path)
        await client.send(struct.pack(">I", 3) + _option(OPT_ABORT))
        await read_exactly(client.sock, 18)
        assert len(await read_exactly(client.sock, 20)) == 20
        with pytest.raises(ConnectionResetError):
            await client.receive()
        client.close()


@pytest.mark.parametrize(
    "stream",
    [
        b"\xff" * 4,
        struct.pack(">I", 3) + b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 3) + _option(OPT_LIST, b"", 0xFFFFFFFF),
        struct.pack(">I", 3) + _option(OPT_EXPORT_NAME, b"nope"),
        struct.pack(">I", 3) + _option(99) * 100,
    ],
    ids=["flags", "http", "huge", "unknown-export", "endless"],
)
async def test_a_broken_handshake_is_closed_and_others_go_on(tmp_path: Path, stream: bytes) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096))) as served:
        client = await Client.open(served.path)
        await client.send(stream)
        with pytest.raises(ConnectionError):
            while True:
                await client.receive()
        client.close()
        await served.until(lambda: not served.server._negotiating)
        other = await served.connect()
        assert not (await other.ask(CMD_READ, 0, 1)).error
        other.close()


async def test_the_connection_limit_of_an_export_holds_and_a_place_comes_free(tmp_path: Path) -> None:
    export = Export("a", raw(MemoryStorage(size=4096)), max_connections=2)
    async with serving(tmp_path, export) as served:
        first, second = await served.connect(), await served.connect()
        assert export.connections == 2
        with pytest.raises(OptionError) as caught:
            await served.connect()
        assert caught.value.reply == REP_ERR_POLICY
        first.close()
        await served.until(lambda: export.connections == 1)
        third = await served.connect()
        second.close()
        third.close()
        await served.until(lambda: export.connections == 0)


async def test_a_long_list_to_a_slow_reader_arrives_whole(tmp_path: Path) -> None:
    exports = [Export("abcdefgh"[number] * 4096, raw(MemoryStorage(size=512))) for number in range(8)]
    async with serving(tmp_path, *exports) as served:
        client = await Client.open(served.path)
        rounds = 50
        await client.send(struct.pack(">I", 3) + _option(OPT_LIST) * rounds + _option(OPT_ABORT))
        await asyncio.sleep(0.05)
        expected = 18 + rounds * (8 * (20 + 4 + 4096) + 20) + 20
        received = b""
        while len(received) < expected:
            received += await client.receive()
        assert received[-20:][8:16] == struct.pack(">II", OPT_ABORT, 1)
        with pytest.raises(ConnectionResetError):
            await client.receive()
        client.close()


async def test_clients_share_the_receive_buffer_without_mixing_their_bytes(tmp_path: Path) -> None:
    """Each sends requests cut at odd places, in turns with the others."""
    async with serving(tmp_path, raw(MemoryStorage(size=4 * MIB))) as served:
        clients = [await served.connect(mode=SIMPLE) for _ in range(8)]
        streams = []
        for number, client in enumerate(clients):
            stream = b""
            for part in range(20):
                data = bytes([1 + number * 20 + part]) * (500 + 997 * part)
                _, head = client.transmission.request(1, number * 512 * KIB + part * 20 * KIB, len(data))
                stream += head + data
            streams.append(stream)
        longest = max(map(len, streams))
        for start in range(0, longest, 3331):
            for client, stream in zip(clients, streams, strict=True):
                if start < len(stream):
                    await client.send(stream[start : start + 3331])
            await asyncio.sleep(0)
        for client in clients:
            for cookie in [reply.cookie for reply in client.transmission.in_flight]:
                assert not (await client.reply(cookie)).error
        for number, client in enumerate(clients):
            for part in range(20):
                reply = await client.ask(CMD_READ, number * 512 * KIB + part * 20 * KIB, 500 + 997 * part)
                assert reply.data == bytes([1 + number * 20 + part]) * (500 + 997 * part)
            client.close()


async def test_an_end_in_the_middle_of_the_handshake_is_forgotten(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096))) as served:
        stream = struct.pack(">I", 3) + _option(OPT_EXPORT_NAME, b"a")
        for cut in range(len(stream)):
            client = await Client.open(served.path)
            await client.send(stream[:cut])
            if cut % 2:
                await read_exactly(client.sock, 18)
            client.close()
        await served.until(lambda: not served.server._negotiating)
        client = await Client.open(served.path)
        await old_style(client.sock, b"a")
        client.close()
        await served.until(lambda: served.server.connections == 0)


@pytest.mark.parametrize("seconds", [0.00001, 0.0003, 0.01])
def test_a_client_that_always_has_more_leaves_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    now = 0.0

    def process() -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(connection, "monotonic", lambda: now)
    monkeypatch.setattr(connection, "_MOST_POLLED", 64)
    parser = SimpleNamespace(
        disconnected=False, is_cut=False, get_buffer=lambda: memoryview(b""), received=lambda count: None
    )
    session = SimpleNamespace(reading=True, parser=parser, process=process, tasks=set())
    polled = connection.Connection.__new__(connection.Connection)
    polled.lost, polled._polls_in_vain, polled._yields_again = False, 0, 0.0
    polled._output = SimpleNamespace(receive_into=lambda buffer: 100)  # type: ignore[assignment]
    polled._poll(session, 0)  # type: ignore[arg-type]
    assert round(now / seconds) == {0.00001: 64, 0.0003: 7, 0.01: 1}[seconds]


@pytest.mark.parametrize("earlier", [0, 3])
def test_what_was_begun_has_its_turn_before_more_is_looked_at(monkeypatch: pytest.MonkeyPatch, earlier: int) -> None:
    """A flush of a client that sends on; tasks of before do not matter."""
    processed = 0

    def process() -> None:
        nonlocal processed
        processed += 1
        if processed == 5:
            session.tasks.add("flush")

    monkeypatch.setattr(connection, "monotonic", lambda: 0.0)
    monkeypatch.setattr(connection, "_MOST_POLLED", 64)
    parser = SimpleNamespace(
        disconnected=False, is_cut=False, get_buffer=lambda: memoryview(b""), received=lambda count: None
    )
    session = SimpleNamespace(reading=True, parser=parser, process=process, tasks=set(range(earlier)))
    polled = connection.Connection.__new__(connection.Connection)
    polled.lost, polled._polls_in_vain, polled._yields_again = False, 0, 0.0
    polled._output = SimpleNamespace(receive_into=lambda buffer: 100)  # type: ignore[assignment]
    polled._poll(session, earlier)  # type: ignore[arg-type]
    assert processed == 5


@pytest.mark.parametrize(("took", "yields_each_time"), [(0.0001, [2]), (0.002, [1, 0, 1])])
def test_a_client_in_the_middle_of_a_request_is_let_in(
    monkeypatch: pytest.MonkeyPatch, took: float, yields_each_time: list[int]
) -> None:
    """It sends the rest in its second turn. Who takes 2 ms is somebody else, and has to wait for the next."""
    now, yields, received = 1.0, 0, 0

    def sched_yield() -> None:
        nonlocal now, yields
        now += took
        yields += 1

    def process() -> None:
        nonlocal received
        received += 1
        parser.is_cut = session.reading = False

    monkeypatch.setattr(connection, "monotonic", lambda: now)
    monkeypatch.setattr(connection, "_MOST_POLLED", 64)
    monkeypatch.setattr(connection.os, "sched_yield", sched_yield)
    parser = SimpleNamespace(
        disconnected=False, is_cut=True, get_buffer=lambda: memoryview(b""), received=lambda count: None
    )
    session = SimpleNamespace(reading=True, parser=parser, process=process, tasks=set())
    polled = connection.Connection.__new__(connection.Connection)
    polled.lost, polled._polls_in_vain, polled._yields_again = False, 1, 0.0
    polled._output = SimpleNamespace(receive_into=lambda buffer: -1 if yields < 2 else 100)  # type: ignore[assignment]
    for expected in yields_each_time:
        before = yields
        polled._poll(session, 0)  # type: ignore[arg-type]
        assert yields - before == expected
        now += 0.06
    assert received == 1
