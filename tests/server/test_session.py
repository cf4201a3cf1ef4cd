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
from nbdserve.server.session import MAX_IN_FLIGHT
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, KIB, MIB
from tests.block.layers import overlay
from tests.server.clients import PATIENCE, Client, Gated, io_error, raw, resident, serving

MODES = pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])


async def _alive(client: Client) -> bool:
    return (await client.ask(CMD_READ, 0, 1)).error == 0


# --- every command, in every mode ------------------------------------------------------------------------------------


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


async def test_a_request_to_cache_the_whole_disk_ends_soon(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(size=1 << 50))) as served:
        client = await served.connect()
        assert not (await client.ask(CMD_CACHE, 0, 1 << 50)).error
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


# --- errors fail one request -----------------------------------------------------------------------------------------


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

    def linear_offset(self) -> None:
        """It is mapped."""

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
            assert not (await second.ask(CMD_FLUSH)).error, "nothing has changed since the last one"
            assert not (await first.ask(CMD_WRITE, 0, data=b"x" * 512)).error
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
