"""The NBD client as a storage: against this server, and against one that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nbdserve.errors import ImageError
from nbdserve.exports.export import Export
from nbdserve.extents import DATA, ZERO
from nbdserve.protocol.constants import (
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_WRITE,
    EXPORT_HAS_FLAGS,
    EXPORT_READ_ONLY,
)
from nbdserve.storage import nbd as module
from nbdserve.storage.memory import MemoryStorage
from nbdserve.storage.nbd import NbdStorage
from nbdserve.storage.nbd_target import NbdTarget
from nbdserve.units import KIB, MIB
from tests.server.clients import Gated, raw, serving
from tests.storage.nbd_server import DropError, Unruly, listening


@contextlib.asynccontextmanager
async def opened(target: NbdTarget, *, read_only: bool = False) -> AsyncIterator[NbdStorage]:
    storage = await NbdStorage.open(target, read_only=read_only)
    try:
        yield storage
    finally:
        await storage.close()


@contextlib.asynccontextmanager
async def over(storage: MemoryStorage, folder: Path, *, block: int = 1) -> AsyncIterator[NbdStorage]:
    """``storage`` served, and a client of it."""
    export = Export("a", raw(storage, unmap=True))
    export.minimum_block = block
    async with serving(folder, export) as served, opened(NbdTarget("a", socket=served.path)) as client:
        yield client


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


# --- against this server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 512, 4096])
async def test_it_is_the_disk_that_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Random operations, also where they have to be cut in pieces and begin and end inside blocks."""
    monkeypatch.setattr(module, "_LONGEST_TRANSFER", 24 * KIB)
    monkeypatch.setattr(module, "_LONGEST_CHANGE", 40 * KIB)
    monkeypatch.setattr(module, "_ZERO_WRITE", 3 * KIB)
    source, size = random.Random(block), MIB
    model = bytearray(source.randbytes(size))
    disk = MemoryStorage(bytes(model))
    async with over(disk, tmp_path, block=block) as client:
        assert (client.size, client.alignment) == (size, block)
        for _ in range(60):
            offset = source.randrange(size)
            length = min(size - offset, source.choice([1, 100, 4096, 100_000]))
            if source.random() < 0.5:
                offset -= offset % 4096
                length = min(size - offset, -(-length // 4096) * 4096)
            match source.randrange(4):
                case 0:
                    data = source.randbytes(length)
                    await client.write(offset, data)
                    model[offset : offset + length] = data
                case 1:
                    await client.zero(offset, length, unmap=source.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                case 2:
                    assert await client.read(offset, length) == model[offset : offset + length]
                case _:
                    pieces = [(at, source.randbytes(500)) for at in range(offset, min(offset + 5000, size - 500), 1000)]
                    await (client.write_all if source.random() < 0.5 else client.write_stable)(pieces)
                    for at, data in pieces:
                        model[at : at + 500] = data
        assert await client.read(0, size) == model
        assert await client.read(size - 5, 10) == model[-5:] + bytes(5)
        assert await disk.read(0, size) == model
        runs = await client.host_map(0, size + 100)
        assert int(runs.start[0]) == 0
        assert int(runs.start[-1] + runs.length[-1]) == size + 100
        for start, length, kind in zip(runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True):
            assert kind in (DATA, ZERO)
            assert kind == DATA or not any(model[start : start + length])


async def test_many_requests_are_under_way_at_once(tmp_path: Path) -> None:
    disk = Gated(size=MIB)
    async with over(disk, tmp_path) as client:
        disk.gate.clear()
        reads = [asyncio.ensure_future(client.read(at * KIB, KIB)) for at in range(20)]
        await until(lambda: disk.waiting == 20)
        disk.gate.set()
        assert await asyncio.gather(*reads) == [bytes(KIB)] * 20


async def test_the_map_is_that_of_the_server(tmp_path: Path) -> None:
    disk = MemoryStorage(size=MIB)
    await disk.write(256 * KIB, b"x" * 64 * KIB)
    async with over(disk, tmp_path) as client:
        runs = await client.host_map(100, MIB)
        assert list(zip(runs.start.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True)) == [
            (100, ZERO, -1),
            (256 * KIB, DATA, 256 * KIB),
            (320 * KIB, ZERO, -1),
        ]
        cut = await client.host_map(0, MIB, 2)
        assert cut.length.tolist() == [256 * KIB, 64 * KIB]
        assert len(await client.host_map(0, 0)) == 0


async def test_what_cannot_be_done(tmp_path: Path) -> None:
    async with over(MemoryStorage(size=MIB), tmp_path) as client:
        for work, number in (
            (client.write(MIB - 1, b"xy"), errno.ENOSPC),
            (client.zero(MIB, 1), errno.ENOSPC),
            (client.truncate(2 * MIB), errno.EINVAL),
        ):
            with pytest.raises(OSError, match=client.path.replace("?", ".").replace("+", ".")) as error:
                await work
            assert error.value.errno == number
        await client.truncate(10)
        assert client.size == MIB
        assert client.allocated_size() is None
        with pytest.raises(ImageError, match="export 'nope' is not present"):
            await NbdStorage.open(NbdTarget("nope", socket=client.target.socket), read_only=True)
    with pytest.raises(OSError, match="is closed"):
        await client.read(0, 1)


async def test_the_error_of_the_server_is_told(tmp_path: Path) -> None:
    disk = Gated(size=MIB)
    disk.flush_error = OSError(errno.ENOSPC, "no room")
    async with over(disk, tmp_path) as client:
        await client.write(0, b"x")
        for _ in range(2):  # a failed flush is final
            with pytest.raises(OSError, match="no room"):
                await client.flush()
        with pytest.raises(OSError, match="data may be lost"):
            await client.write(0, b"y")


async def test_a_read_only_export_is_not_opened_for_writing(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s", flags=EXPORT_HAS_FLAGS | EXPORT_READ_ONLY)
    async with listening(server):
        with pytest.raises(ImageError, match="the server exports it read-only"):
            await NbdStorage.open(server.target(), read_only=False)
        async with opened(server.target(), read_only=True) as client:
            with pytest.raises(OSError, match="read-only"):
                await client.write(0, b"x")
            await client.flush()
        assert [command for command, _, _ in server.requests] == []


# --- what a server may lack ------------------------------------------------------------------------------------------


async def test_a_server_that_can_only_read_and_write(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s", content=bytearray(b"x" * MIB), flags=EXPORT_HAS_FLAGS)
    async with listening(server), opened(server.target()) as client:
        await client.zero(10, 20)
        await client.discard(0, 100)
        await client.flush()
        assert bytes(server.content[:40]) == b"x" * 10 + bytes(20) + b"x" * 10
        with pytest.raises(OSError, match="no fast zeroing") as error:
            await client.zero(0, 100, fast=True)
        assert error.value.errno == errno.ENOTSUP
        assert (await client.host_map(5, MIB)).kind.tolist() == [DATA, ZERO]
        assert {command for command, _, _ in server.requests} == {CMD_WRITE}


async def test_stable_writes_need_no_flush_where_the_server_has_fua(tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []

    class Noting(NbdStorage):
        async def _request(self, command: int, offset: int, length: int, **more: object) -> object:  # type: ignore[override]
            sent.append((command, more.get("flags", 0)))  # type: ignore[arg-type]
            return await super()._request(command, offset, length, **more)  # type: ignore[arg-type]

    async with serving(tmp_path, raw(MemoryStorage(size=MIB))) as served:
        client = await Noting.open(NbdTarget("a", socket=served.path), read_only=False)
        await client.flush()
        sent.clear()
        await client.write_stable([(0, b"x"), (5, b"y")])
        assert sent == [(CMD_WRITE, CMD_FLAG_FUA)] * 2
        await client.write(0, b"z")
        await client.write_stable([(0, b"x")])
        assert sent[-1] == (CMD_FLUSH, 0)
        await client.close()


# --- servers that go and come ----------------------------------------------------------------------------------------


async def test_what_was_not_answered_is_sent_again(tmp_path: Path) -> None:
    """The server goes down with reads, writes and a flush under way, and comes back with another process."""
    server = Unruly(tmp_path / "s")
    drops = 0

    def rule(command: int, offset: int, length: int) -> None:
        nonlocal drops
        if len(server.requests) == 6:
            drops += 1
            raise DropError

    server.rule = rule
    async with listening(server), opened(server.target(reconnect_delay=60)) as client:
        await client.write(0, b"first")
        work = [client.write(KIB * at, b"%d" % at * 5) for at in range(1, 9)]
        await asyncio.gather(*work, client.flush(), client.read(0, 5))
        assert drops == 1
        assert server.connections == 2
        for at in range(1, 9):
            assert bytes(server.content[KIB * at : KIB * at + 5]) == b"%d" % at * 5
        assert await client.read(0, 5) == b"first"


async def test_requests_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s", content=bytearray(b"x" * MIB))
    async with listening(server):
        client = await NbdStorage.open(server.target(reconnect_delay=60), read_only=False)
    waiting = [asyncio.ensure_future(client.read(at, 1)) for at in range(3)]
    await asyncio.sleep(0.1)
    assert not any(read.done() for read in waiting)
    async with listening(server):
        assert await asyncio.gather(*waiting) == [b"x"] * 3
        assert server.connections == 2
        await client.close()


async def test_without_a_delay_they_fail_and_later_ones_try_anew(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s", rule=lambda *_: _raise(DropError()))
    async with listening(server):
        client = await NbdStorage.open(server.target(), read_only=True)
        with pytest.raises(OSError, match="the connection is lost") as error:
            await client.read(0, 1)
        assert error.value.errno == errno.EIO
        assert str(client.target.uri) in str(error.value)
    with pytest.raises(OSError, match="No such file or directory"):
        await client.read(0, 1)
    server.rule = lambda *_: None
    async with listening(server):
        await until_tried_anew(client)
        assert await client.read(0, 1) == b"\0"
    await client.close()


async def test_the_delay_is_not_exceeded(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s", rule=lambda *_: _raise(DropError()))
    loop = asyncio.get_running_loop()
    async with listening(server), opened(server.target(reconnect_delay=0.3)) as client:
        begin = loop.time()
        with pytest.raises(OSError, match="the connection is lost"):
            await asyncio.wait_for(client.read(0, 1), 60)
        assert loop.time() - begin >= 0.3
        # one that drops whoever asks is not called in a busy loop
        assert server.connections < 12


async def test_another_export_under_the_old_name_is_not_taken(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s")
    async with listening(server), opened(server.target()) as client:
        server.size = MIB + 512
        server.drop()
        await until_lost(client)
        with pytest.raises(OSError, match=f"the export has {MIB + 512} bytes now, and had {MIB}"):
            await client.read(0, 1)
        server.size, server.flags = None, EXPORT_HAS_FLAGS | EXPORT_READ_ONLY
        await until_tried_anew(client)
        with pytest.raises(OSError, match="the export is read-only now"):
            await client.read(0, 1)


async def test_a_server_that_shuts_down_is_waited_for(tmp_path: Path) -> None:
    answers = iter([errno.ESHUTDOWN])
    server = Unruly(tmp_path / "s", rule=lambda *_: next(answers, None))
    async with listening(server), opened(server.target(reconnect_delay=60)) as client:
        await client.write(0, b"x")
        assert server.content[0] == ord("x")
        assert server.connections == 2


async def test_the_first_connection_is_waited_for_when_asked(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s")
    with pytest.raises(ImageError, match=r"Failed to connect to '.*/s': No such file or directory"):
        await NbdStorage.open(server.target(), read_only=True)
    opening = asyncio.ensure_future(NbdStorage.open(server.target(open_timeout=60), read_only=True))
    await asyncio.sleep(0.1)
    async with listening(server):
        await (await opening).close()


async def test_a_cancelled_write_ends_when_its_buffer_is_free(tmp_path: Path) -> None:
    """The bytes of a request must not change while they are being sent."""
    disk = Gated(size=MIB)
    async with over(disk, tmp_path) as client:
        disk.gate.clear()
        write = asyncio.ensure_future(client.write(0, b"x"))
        await until(lambda: disk.waiting)
        write.cancel()
        await asyncio.sleep(0.02)
        assert not write.done()
        disk.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await write


async def until_tried_anew(client: NbdStorage) -> None:
    """Wait until the next request does not fail for the reason of the last one."""
    await until(lambda: asyncio.get_running_loop().time() >= client._not_before)


async def until_lost(client: NbdStorage) -> None:
    """Read until the loss is noticed."""
    with contextlib.suppress(OSError):
        while True:
            await client.read(0, 1)
            await asyncio.sleep(0.005)


def _raise(error: Exception) -> None:
    raise error
