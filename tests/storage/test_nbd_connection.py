"""One connection: the handshake, and servers that break the protocol or say nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from nbdserve.errors import ImageError, OptionError
from nbdserve.protocol.constants import CMD_FLUSH, CMD_READ, CMD_WRITE
from nbdserve.storage import nbd_connection as module
from nbdserve.storage.memory import MemoryStorage
from nbdserve.storage.nbd import NbdStorage
from nbdserve.storage.nbd_connection import LostError, NbdConnection
from nbdserve.storage.nbd_target import NbdTarget
from nbdserve.units import MIB
from tests.server.clients import raw, serving
from tests.storage.nbd_server import Unruly, listening


@contextlib.asynccontextmanager
async def opened(target: NbdTarget) -> AsyncIterator[NbdStorage]:
    storage = await NbdStorage.open(target, read_only=True)
    try:
        yield storage
    finally:
        await storage.close()


async def test_requests_and_replies(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(b"abc", size=MIB))) as served:
        connection = await NbdConnection.open(NbdTarget("a", socket=served.path))
        assert connection.export.size == MIB
        assert [name for _, name in connection.export.contexts] == ["base:allocation"]
        write = connection.request(CMD_WRITE, 1, 2, data=b"xy")
        assert not (await write).error
        assert (await connection.request(CMD_READ, 0, 4)).data == b"axy\0"
        assert connection.answered
        left = connection.request(CMD_FLUSH, 0, 0)
        connection.close("enough")
        for reply in (left, connection.request(CMD_READ, 0, 1)):
            with pytest.raises(LostError, match="enough"):
                await reply
        with pytest.raises(OptionError, match="not present"):
            await NbdConnection.open(NbdTarget("b", socket=served.path))


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_on_either_event_loop(tmp_path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """The server runs on one, the image commands on the other."""

    async def use() -> None:
        async with listening(Unruly(tmp_path / "s")) as server:
            storage = await NbdStorage.open(server.target(reconnect_delay=60), read_only=False)
            data = bytes(range(256)) * 2048
            await storage.write(5, data)
            server.drop()
            assert await storage.read(5, len(data)) == data
            await storage.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(use())


async def test_over_tcp(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "unused", content=bytearray(b"x" * MIB))
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    connection = await NbdConnection.open(NbdTarget("disk", "127.0.0.1", port))
    assert (await connection.request(CMD_READ, 5, 3)).data == b"xxx"
    connection.close()
    listener.close()
    await listener.wait_closed()
    with pytest.raises(OSError, match="Connection refused"):
        await NbdConnection.open(NbdTarget("disk", "127.0.0.1", port))


async def test_an_end_without_replies(tmp_path: Path) -> None:
    server = Unruly(tmp_path / "s", rule=lambda *_: b"")
    async with listening(server):
        connection = await NbdConnection.open(server.target())
        reply = connection.request(CMD_READ, 0, 1)
        await asyncio.sleep(0.02)
        server.drop()
        with pytest.raises(LostError):
            await reply
        assert connection.lost


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"\0" * 16, "bad reply magic"),
        (b"\x67\x44\x66\x98" + bytes(4) + b"\xff" * 8, "not in flight"),
    ],
)
async def test_nonsense_ends_the_connection(tmp_path: Path, answer: bytes, problem: str) -> None:
    server = Unruly(tmp_path / "s", rule=lambda *_: answer)
    async with listening(server), opened(server.target()) as client:
        with pytest.raises(OSError, match=problem):
            await client.read(0, 1)


async def test_a_size_that_is_no_size_is_refused(tmp_path: Path) -> None:
    async with listening(Unruly(tmp_path / "s", size=1 << 63)) as server:
        with pytest.raises(ImageError, match="too large"):
            await NbdStorage.open(server.target(), read_only=True)
    async with listening(Unruly(tmp_path / "s", greeting=b"HTTP/1.1 400 Bad Request\r\n")) as server:
        with pytest.raises(ImageError, match="not a newstyle NBD server"):
            await NbdStorage.open(server.target(), read_only=True)


async def test_silence_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.1)
    async with listening(Unruly(tmp_path / "s", rule=lambda *_: b"")) as server, opened(server.target()) as client:
        with pytest.raises(OSError, match=r"silent for 0\.1 seconds"):
            await client.read(0, 1)
    async with listening(Unruly(tmp_path / "s", greeting=b"")) as server:
        with pytest.raises(ImageError, match=r"no answer within 0\.1 seconds"):
            await NbdStorage.open(server.target(), read_only=True)
