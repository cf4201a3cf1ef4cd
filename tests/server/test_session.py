"""The transmission phase through a real server: each request gets one final reply, whatever happens to the others."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import RequestError
from nbdserve.extents import Run
from nbdserve.formats.raw import RawDriver
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)
from nbdserve.server.session import MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, KIB, MIB
from tests.block.layers import overlay
from tests.server.clients import PATIENCE, Client, Gated, io_error, raw, resident, serving, simple_request

MODES = pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])


async def _alive(client: Client) -> bool:
    return (await client.ask(CMD_READ, 0, 1)).error == 0


# --- every command, in every mode -------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("make", [MemoryStorage, Gated])
async def test_what_is_written_is_read_back(tmp_path: Path, mode: int, make: type[MemoryStorage]) -> None:
    rng = random.Random(mode)
    size = 5 * MIB
    model = bytearray(size)
    async with serving(tmp_path, raw(make(size=size), unmap=True)) as served:
        client = await served.connect(mode=mode)
        for number in range(60):
            length = rng.choice((1, 512, 4096, 65_536, 65_537, 300_000, 3 * MIB))
            offset = rng.randrange(size - length + 1)
            flags = rng.choice((0, CMD_FLAG_FUA))
            if number % 3 == 0:
                data = rng.randbytes(length)
                assert not (await client.ask(CMD_WRITE, offset, data=data, flags=flags)).error
                model[offset : offset + length] = data
            elif number % 3 == 1:
                assert not (await client.ask(CMD_WRITE_ZEROES, offset, length, flags=flags)).error
                model[offset : offset + length] = bytes(length)
            reply = await client.ask(CMD_READ, offset, length)
            assert not reply.error
            assert reply.data == model[offset : offset + length]
        for command in (CMD_FLUSH, CMD_CACHE, CMD_TRIM):
            assert not (await client.ask(command, 0, 0 if command == CMD_FLUSH else 4096)).error
        client.close()


@MODES
async def test_a_chain_is_read_right_in_every_mix_of_layers(tmp_path: Path, mode: int) -> None:
    """Structured replies carry holes and data in chunks; the client role checks that they cover the request once."""
    base = MemoryStorage(random.Random(1).randbytes(900_000), path="base.raw")
    node = await overlay(base, MIB)
    for offset in range(0, MIB, 40_000):
        await node.write(offset, bytes([offset // 40_000 + 1]) * 5000)
    await node.zero(400_000, 100_000)
    content = await node.read(0, MIB)
    async with serving(tmp_path, node) as served:
        client = await served.connect(mode=mode)
        rng = random.Random(2)
        for _ in range(80):
            length = rng.choice((1, 4096, 20_000, 200_000, MIB))
            offset = rng.randrange(MIB - length + 1)
            for flags in (0, CMD_FLAG_DF) if mode != SIMPLE else (0,):
                reply = await client.ask(CMD_READ, offset, length, flags=flags)
                assert not reply.error
                assert reply.data == content[offset : offset + length]
        client.close()


@MODES
async def test_requests_of_length_zero_are_answered_even_at_the_end(tmp_path: Path, mode: int) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), await overlay(None, 2 * MIB)) as served:
        for name in ("a", "b"):
            client = await served.connect(name, mode=mode)
            size = client.export.size
            for offset in (0, 1, size):
                for command in (CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM, CMD_CACHE):
                    reply = await client.ask(command, offset, 0)
                    assert reply.error == 0, (command, offset)
            assert await _alive(client)
            client.close()


async def test_the_largest_read_and_write_are_served(tmp_path: Path) -> None:
    size = 65 * MIB
    async with serving(tmp_path, raw(MemoryStorage(size=size)), raw(Gated(size=size))) as served:
        for name in ("a", "b"):
            client = await served.connect(name)
            data = bytes(range(256)) * (64 * MIB // 256)
            assert not (await client.ask(CMD_WRITE, 4096, data=data)).error
            reply = await client.ask(CMD_READ, 4096, 64 * MIB)
            assert reply.data == data
            client.close()


async def test_fast_zero_of_a_storage_that_has_none_is_refused_untouched(tmp_path: Path) -> None:
    class Slow(MemoryStorage):
        async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
            if fast:
                raise OSError(errno.ENOTSUP, "slow")
            await super().zero(offset, length)

    async with serving(tmp_path, raw(Slow(b"x" * 8192))) as served:
        client = await served.connect()
        assert (await client.ask(CMD_WRITE_ZEROES, 0, 4096, flags=CMD_FLAG_FAST_ZERO)).error == errno.ENOTSUP
        assert (await client.ask(CMD_READ, 0, 8192)).data == b"x" * 8192
        assert (await client.ask(CMD_WRITE_ZEROES, 0, 4096, flags=CMD_FLAG_NO_HOLE)).error == 0
        assert (await client.ask(CMD_READ, 0, 8192)).data == bytes(4096) + b"x" * 4096
        client.close()


# --- errors fail one request --------------------------------------------------------------------------------------------


@MODES
async def test_what_is_refused_leaves_the_connection_alive(tmp_path: Path, mode: int) -> None:
    async with serving(
        tmp_path, raw(MemoryStorage(size=4096)), raw(MemoryStorage(size=4096), read_only=True)
    ) as served:
        client = await served.connect(mode=mode)
        for command, offset, length, flags, data, error in (
            (CMD_READ, 4096, 1, 0, b"", errno.EINVAL),
            (CMD_READ, 1 << 63, 1, 0, b"", errno.EINVAL),
            (CMD_READ, 0, 64 * MIB + 1, 0, b"", errno.EINVAL),
            (CMD_WRITE, 4000, 0, 0, b"x" * 97, errno.ENOSPC),
            (CMD_TRIM, 4000, 97, 0, b"", errno.EINVAL),
            (CMD_READ, 0, 1, 1 << 9, b"", errno.EINVAL),
            (CMD_BLOCK_STATUS, 0, 1, 0, b"", errno.EINVAL),
            (77, 0, 0, 0, b"", errno.EINVAL),
        ):
            reply = await client.ask(command, offset, length, flags=flags, data=data)
            assert reply.error == error, (command, offset, length)
            assert await _alive(client)
        client.close()
        client = await served.connect("b", mode=mode)
        assert (await client.ask(CMD_WRITE, 0, data=b"x")).error == errno.EPERM
        assert (await client.ask(CMD_WRITE_ZEROES, 0, 1)).error == errno.EPERM
        assert (await client.ask(CMD_FLUSH)).error == 0
        client.close()


async def test_a_write_that_is_too_long_is_drained_and_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=256 * MIB))) as served:
        for mode in (SIMPLE, EXTENDED):
            client = await served.connect(mode=mode)
            before = resident()
            cookie = await client.request(CMD_WRITE, 0, 64 * MIB + 1)
            chunk = b"x" * MIB
            for _ in range(64):
                await client.send(chunk)
            await client.send(b"x")
            assert (await client.reply(cookie)).error == errno.EINVAL
            assert resident() - before < 8 * MIB
            reply = await client.ask(CMD_READ, 0, 512)
            assert reply.data == bytes(512)
            client.close()


async def test_a_write_longer_than_is_drained_ends_the_connection(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=GIB))) as served:
        for length in (128 * MIB + 1, 0xFFFFFFFF):
            client = await served.connect()
            earlier = await client.request(CMD_READ, 0, 512)
            await client.request(CMD_WRITE, 0, length)
            assert (await client.reply(earlier)).data == bytes(512), "what came before is answered"
            await client.closed()
            client.close()
        assert await _alive(await served.connect())


async def test_garbage_ends_the_connection_after_what_came_before_is_answered(tmp_path: Path) -> None:
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(MemoryStorage(size=4096)), raw(storage)) as served:
        client = await served.connect(mode=SIMPLE)
        reads = [client.transmission.request(CMD_READ, 0, 512) for _ in range(3)]
        await client.send(b"".join(data for _, data in reads) + b"garbage!" * 8)
        for cookie, _ in reads:
            assert (await client.reply(cookie)).data == bytes(512)
        await client.closed()
        client.close()

        client = await served.connect("b", mode=SIMPLE)
        writes = [client.transmission.request(CMD_WRITE, 512 * number, 512) for number in range(3)]
        await client.send(b"".join(head + b"w" * 512 for _, head in writes) + b"garbage!" * 8)
        await client.closed()
        client.close()
        other = await served.connect("b")
        assert not (await other.ask(CMD_WRITE_ZEROES, 0, MIB)).error, "nothing is left locked"
        other.close()


async def test_garbage_behind_more_requests_than_fit_ends_the_connection_too(tmp_path: Path) -> None:
    """The garbage is found when work in flight ends, not when bytes arrive."""
    storage = Gated(size=MIB)
    async with serving(tmp_path, raw(storage)) as served:
        for command in (CMD_READ, CMD_WRITE, CMD_FLUSH):
            client = await served.connect(mode=SIMPLE)
            storage.gate.clear()
            length = 0 if command == CMD_FLUSH else 512
            payload = b"w" * 512 if command == CMD_WRITE else b""
            count = MAX_IN_FLIGHT + 20
            requests = b"".join(
                client.transmission.request(command, 512 * number if length else 0, length)[1] + payload
                for number in range(count)
            )
            await client.send(requests + b"garbage!" * 8)
            await served.until(lambda: storage.waiting > 0)
            storage.gate.set()
            await client.closed()
            client.close()
            await served.until(lambda: served.server.connections == 0)


class CorruptAt(RawDriver):
    """A mapping whose second 4 KiB are corrupt."""

    def lookup(self, offset: int, length: int) -> Run:
        if offset <= 4096 < offset + length or offset // 4096 == 1:
            raise RequestError(errno.EIO, "invalid L2 entry")
        return super().lookup(offset, length)

    lookup_writable = lookup


@MODES
async def test_a_corrupt_mapping_fails_the_requests_that_meet_it(tmp_path: Path, mode: int) -> None:
    node = Node([CorruptAt(MemoryStorage(size=64 * KIB), 0, 64 * KIB, read_only=False)])
    async with serving(tmp_path, node) as served:
        client = await served.connect(mode=mode)
        for length in (512, 40_000):
            cookies = [
                await client.request(CMD_READ, 0, 512),
                await client.request(CMD_READ, 4096, length),
                await client.request(CMD_WRITE, 4096, data=b"x" * length),
                await client.request(CMD_WRITE_ZEROES, 4096, length),
                await client.request(CMD_READ, 8192, 512),
            ]
            errors = [(await client.reply(cookie)).error for cookie in cookies]
            assert errors == [0, errno.EIO, errno.EIO, errno.EIO, 0]
        client.close()


async def test_an_unforeseen_error_fails_one_request(tmp_path: Path) -> None:
    class Broken(Gated):
        async def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == 512:
                raise KeyError("a bug")
            await super().read_into(offset, buffer)

    async with serving(tmp_path, raw(Broken(size=4096))) as served:
        client = await served.connect()
        assert (await client.ask(CMD_READ, 512, 512)).error == errno.EIO
        assert await _alive(client)
        client.close()


async def test_a_failed_flush_is_reported_on_every_connection_and_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    storage = await FileStorage.open(str(path))

    def failing(fd: int) -> None:
        raise io_error()

    async with serving(tmp_path, raw(storage)) as served:
        first, second = await served.connect(), await served.connect()
        assert not (await first.ask(CMD_WRITE, 0, data=b"x" * 512)).error
        assert not (await first.ask(CMD_FLUSH)).error
        with monkeypatch.context() as patched:
            patched.setattr("os.fdatasync", failing)
            patched.setattr("os.fsync", failing)
            assert (await first.ask(CMD_FLUSH)).error == errno.EIO
        third = await served.connect()
        for client in (first, second, third):
            assert (await client.ask(CMD_FLUSH)).error == errno.EIO
            assert (await client.ask(CMD_WRITE, 0, data=b"y", flags=CMD_FLAG_FUA)).error == errno.EIO
            assert (await client.ask(CMD_WRITE, 0, data=b"y" * 512)).error == errno.EIO
            assert (await client.ask(CMD_READ, 0, 512)).data[:1] == b"x"
            client.close()
    await storage.close()


async def test_a_request_with_fua_is_answered_after_its_flush(tmp_path: Path) -> None:
    class Slow(MemoryStorage):
        flushing = asyncio.Event()
        go = asyncio.Event()

        async def flush(self) -> None:
            self.flushing.set()
            await self.go.wait()

    storage = Slow(size=64 * KIB)
    async with serving(tmp_path, raw(storage, unmap=True)) as served:
        client = await served.connect()
        for command, data in ((CMD_WRITE, b"x" * 512), (CMD_WRITE_ZEROES, b""), (CMD_TRIM, b"")):
            storage.flushing.clear()
            storage.go.clear()
            cookie = await client.request(command, 0, 512, data=data, flags=CMD_FLAG_FUA)
            await asyncio.wait_for(storage.flushing.wait(), PATIENCE)
            assert not (await client.ask(CMD_WRITE, 4096, data=b"y")).error, "others go on"
            assert client.unanswered == 1
            storage.go.set()
            assert not (await client.reply(cookie)).error
        client.close()


# --- many at once -------------------------------------------------------------------------------------------------------


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
            cookies = [await client.request(CMD_READ, 0, length) for _ in range(2 * MAX_IN_FLIGHT)]
            await asyncio.sleep(0.1)
            assert storage.waiting == limit
            other = await served.connect()
            storage.gate.set()
            assert await _alive(other)
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
        sending = asyncio.create_task(client.send(b"".join(head + b"w" for _, head in heads)))
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


@pytest.mark.parametrize("make", [MemoryStorage, Gated], ids=["cached", "cold"])
async def test_a_client_that_never_reads_costs_little(tmp_path: Path, make: type[MemoryStorage]) -> None:
    async with serving(tmp_path, raw(make(b"x" * MIB, size=4 * GIB))) as served:
        client = await served.connect(mode=SIMPLE)
        other = await served.connect()
        before = resident()
        cookies = [client.transmission.request(CMD_READ, 0, MIB) for _ in range(2000)]
        for reply in client.transmission.in_flight:
            reply.data = bytearray(0)  # nothing is received, so the client needs no memory
        before = resident()
        await client.send(b"".join(data for _, data in cookies))
        await asyncio.sleep(0.3)
        for _ in range(20):
            assert await _alive(other)
        assert resident() - before <= 68 * MIB
        client.close()
        await served.until(lambda: served.server.connections == 1)
        other.close()


async def test_a_client_that_reads_late_gets_every_byte(tmp_path: Path) -> None:
    content = random.Random(5).randbytes(MIB)
    for number, storage in enumerate((MemoryStorage(content), Gated(content))):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with serving(folder, raw(storage)) as served:
            client = await served.connect(mode=STRUCTURED)
            cookies = [await client.request(CMD_READ, 100 * number, 500_000) for number in range(150)]
            await asyncio.sleep(0.05)
            for number, cookie in enumerate(cookies):
                assert (await client.reply(cookie)).data == content[100 * number :][:500_000]
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
            assert await _alive(other)
            other.close()


# --- shutting down --------------------------------------------------------------------------------------------------------


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
        cookies = [await client.request(CMD_READ, 0, 512) for _ in range(MAX_IN_FLIGHT + 30)]
        await served.until(lambda: storage.waiting == MAX_IN_FLIGHT)
        stopping = asyncio.create_task(served.server.stop(PATIENCE))
        await asyncio.sleep(0.02)
        storage.gate.set()
        errors = [(await client.reply(cookie)).error for cookie in cookies]
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
