"""Many requests at once, clients that leave or do not read, and a server that stops: no reply is lost or doubled."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.constants import (
    CMD_FLAG_FUA,
    CMD_READ,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)
from nbdserve.server.session import MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, KIB, MIB
from tests.server.clients import PATIENCE, Client, Gated, raw, serving, simple_request
from tests.server.memory import measure

MODES = pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])


@MODES
async def test_disconnecting_with_requests_in_flight_gets_all_their_replies(tmp_path: Path, mode: int) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect(mode=mode)
        storage.gate.clear()
        cookies = []
        for number in range(16):
            if number % 2:
                cookies.append(await client.request(CMD_READ, number * 4096, 4096))
            else:
                cookies.append(await client.request(CMD_WRITE, number * 4096, data=b"w" * 4096))
        await client.send(client.transmission.disconnect())
        await served.until(lambda: storage.waiting >= 9)
        storage.gate.set()
        for cookie in cookies:
            assert (await client.reply(cookie)).error == 0
        assert await client.closed()
        client.close()


async def test_disconnecting_behind_more_requests_than_fit_gets_all_their_replies(tmp_path: Path) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect()
        storage.gate.clear()
        cookies = [await client.request(CMD_READ, 0, 512) for _ in range(3 * MAX_IN_FLIGHT)]
        await client.send(client.transmission.disconnect())
        await asyncio.sleep(0.05)
        storage.gate.set()
        for cookie in cookies:
            assert (await client.reply(cookie)).error == 0
        assert await client.closed()
        client.close()


async def test_a_half_closed_client_still_gets_its_replies(tmp_path: Path) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect()
        storage.gate.clear()
        cookies = [await client.request(CMD_READ, 0, 4096) for _ in range(2 * MAX_IN_FLIGHT)]
        client.sock.shutdown(1)
        await asyncio.sleep(0.05)
        storage.gate.set()
        for cookie in cookies:
            assert (await client.reply(cookie)).error == 0
        assert await client.closed()
        client.close()


async def test_no_more_than_the_limit_is_in_flight_per_client(tmp_path: Path) -> None:
    storage = Gated(size=2 * GIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect()
        for length, limit in ((4096, MAX_IN_FLIGHT), (8 * MIB, MAX_IN_FLIGHT_BYTES // (8 * MIB))):
            storage.gate.clear()
            cookies = [await client.request(CMD_READ, 0, length) for _ in range(limit + 3)]
            await served.until(lambda: storage.waiting >= limit)  # noqa: B023
            await asyncio.sleep(0.05)
            assert storage.waiting == limit
            other = await served.connect()
            storage.gate.set()
            assert not (await other.ask(CMD_READ, 0, 1)).error
            other.close()
            for cookie in cookies:
                assert (await client.reply(cookie)).error == 0
        client.close()


async def test_writes_are_limited_too(tmp_path: Path) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect(mode=SIMPLE)
        storage.gate.clear()
        count = 5000
        heads = [client.transmission.request(CMD_WRITE, number, 1) for number in range(count)]
        sending = asyncio.gather(client.send(b"".join(head + b"w" for _, head in heads)))
        await asyncio.sleep(0.1)
        session = next(iter(served.server._clients)).session
        assert session is not None
        assert session._in_flight <= MAX_IN_FLIGHT
        storage.gate.set()
        await sending
        for cookie, _ in heads:
            assert (await client.reply(cookie)).error == 0
        assert (await client.ask(CMD_READ, 0, count)).data == b"w" * count
        client.close()


async def test_small_writes_mixed_with_everything_keep_their_payloads(tmp_path: Path) -> None:
    """Payloads that wait are copies: the buffer they came in is used by the next client at once."""
    async with serving(tmp_path, raw(Gated(size=4 * MIB)), raw(MemoryStorage(size=4 * MIB))) as served:
        for name in ("a", "b"):
            clients = [
                await served.connect(name, mode=(SIMPLE, STRUCTURED, EXTENDED)[number % 3]) for number in range(6)
            ]

            async def work(client: Client, number: int) -> None:
                rng = random.Random(number)
                base = number * 640 * KIB
                model = bytearray(600 * KIB)
                for _ in range(6):
                    waiting = []
                    for slot in range(40):
                        at = slot * 15 * KIB
                        data = rng.randbytes(rng.choice((1, 100, 4096, 15 * KIB)))
                        model[at : at + len(data)] = data
                        waiting.append(await client.request(CMD_WRITE, base + at, data=data))
                    large = rng.randbytes(80 * KIB)
                    assert not (await client.ask(CMD_WRITE, base + 520 * KIB, data=b"")).error
                    for cookie in waiting:
                        assert not (await client.reply(cookie)).error
                    assert not (await client.ask(CMD_WRITE, base + 520 * KIB, data=large)).error
                    model[520 * KIB :] = large
                    reply = await client.ask(CMD_READ, base, 600 * KIB)
                    assert reply.data == model

            await asyncio.gather(*(work(client, number) for number, client in enumerate(clients)))
            for client in clients:
                client.close()


@pytest.mark.parametrize("storage", ["cached", "cold"])
def test_a_client_that_never_reads_costs_little(storage: str) -> None:
    assert measure("unread", storage)["growth"] <= 64 * MIB


async def test_a_client_that_reads_late_gets_every_byte(tmp_path: Path) -> None:
    content = random.Random(5).randbytes(MIB)
    for number, storage in enumerate((MemoryStorage(content), Gated(content))):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with serving(folder, raw(storage)) as served:
            client = await served.connect(mode=STRUCTURED)
            cookies = [await client.request(CMD_READ, 100 * number, 500_000) for number in range(150)]
            await asyncio.sleep(0.05)
            for position, cookie in enumerate(cookies):
                assert (await client.reply(cookie)).data == content[100 * position :][:500_000]
            client.close()


async def test_a_client_that_dies_at_any_byte_of_a_payload_harms_nobody(tmp_path: Path) -> None:
    for number, storage in enumerate((MemoryStorage(size=MIB), Gated(size=MIB))):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with serving(folder, raw(storage)) as served:
            for cut in (0, 1, 27, 28, 29, 28 + 511, 28 + 70_000, 28 + 100_000):
                client = await served.connect(mode=SIMPLE)
                await client.request(CMD_READ, 0, 4096)
                head = simple_request(CMD_WRITE, 7, 0, 100_000)
                await client.send((head + b"w" * 100_000)[:cut])
                client.close()
            await served.until(lambda: served.server.connections == 0)
            other = await served.connect()
            assert not (await other.ask(CMD_WRITE_ZEROES, 0, MIB)).error
            assert not (await other.ask(CMD_READ, 0, 1)).error
            other.close()


# --- shutting down ---------------------------------------------------------------------------------------------------


@MODES
async def test_a_server_that_stops_answers_what_is_in_flight_and_refuses_the_rest(tmp_path: Path, mode: int) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect(mode=mode)
        storage.gate.clear()
        in_flight = [await client.request(CMD_READ, 0, 512) for _ in range(5)]
        await served.until(lambda: storage.waiting == 5)
        stopping = asyncio.create_task(served.server.stop(PATIENCE))
        await asyncio.sleep(0.02)
        late = [await client.request(CMD_READ, 0, 512), await client.request(CMD_WRITE, 0, data=b"w" * 100_000)]
        for cookie in late:
            assert (await client.reply(cookie)).error == errno.ESHUTDOWN
        assert not stopping.done()
        storage.gate.set()
        for cookie in in_flight:
            assert (await client.reply(cookie)).error == 0
        assert await client.closed()
        await asyncio.wait_for(stopping, PATIENCE)
        client.close()


async def test_requests_that_wait_for_room_when_the_server_stops_are_refused_not_forgotten(tmp_path: Path) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect()
        storage.gate.clear()
        requests = [client.transmission.request(CMD_READ, 0, 512) for _ in range(MAX_IN_FLIGHT + 30)]
        await client.send(b"".join(data for _, data in requests))
        await served.until(lambda: storage.waiting == MAX_IN_FLIGHT)
        stopping = asyncio.create_task(served.server.stop(PATIENCE))
        await asyncio.sleep(0.02)
        storage.gate.set()
        errors = [(await client.reply(cookie)).error for cookie, _ in requests]
        assert errors == [0] * MAX_IN_FLIGHT + [errno.ESHUTDOWN] * 30
        assert await client.closed()
        await asyncio.wait_for(stopping, PATIENCE)
        client.close()


async def test_disconnect_is_not_an_error_while_draining(tmp_path: Path) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect()
        storage.gate.clear()
        cookie = await client.request(CMD_READ, 0, 512)
        await served.until(lambda: storage.waiting == 1)
        stopping = asyncio.create_task(served.server.stop(PATIENCE))
        await asyncio.sleep(0.01)
        await client.send(client.transmission.disconnect())
        await asyncio.sleep(0.01)
        storage.gate.set()
        assert (await client.reply(cookie)).error == 0
        assert await client.closed()
        await asyncio.wait_for(stopping, PATIENCE)
        client.close()


async def test_a_connection_that_is_lost_lets_its_writes_finish(tmp_path: Path) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect()
        storage.gate.clear()
        await client.request(CMD_WRITE, 0, data=b"w" * 512)
        await client.request(CMD_WRITE, 4096, data=b"w" * 512, flags=CMD_FLAG_FUA)
        await served.until(lambda: storage.waiting == 2)
        client.close()
        await asyncio.sleep(0.05)
        storage.gate.set()
        other = await served.connect()
        assert not (await other.ask(CMD_WRITE_ZEROES, MIB // 2, MIB // 2)).error
        assert (await other.ask(CMD_READ, 0, 512)).data == b"w" * 512
        other.close()
        await served.until(lambda: served.server.connections == 0)


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
async def test_replies_sent_from_the_file_mix_with_others(tmp_path: Path, mode: int) -> None:
    """A batch in which each long reply has short ones before it: all leave once, in order."""
    content = random.Random(mode).randbytes(MIB) + bytes(MIB)
    (tmp_path / "disk").write_bytes(content)
    storage = await FileStorage.open(str(tmp_path / "disk"))
    async with serving(tmp_path, raw(storage)) as served:
        client = await served.connect(mode=mode)
        assert (await client.ask(CMD_READ, 0, len(content))).data == content, "and now it is in the page cache"
        rng = random.Random(mode)
        for _ in range(10):
            asked = {}
            batch = b""
            for _ in range(40):
                length = rng.choice((0, 512, 4096, 32 * KIB, 40 * KIB, 200 * KIB))
                offset = rng.randrange(len(content) - length)
                cookie, head = client.transmission.request(CMD_READ, offset, length)
                asked[cookie] = (offset, length)
                batch += head
            await client.send(batch)
            for cookie, (offset, length) in asked.items():
                assert (await client.reply(cookie)).data == content[offset : offset + length]
        client.close()
    await storage.close()
