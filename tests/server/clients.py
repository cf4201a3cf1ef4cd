"""What the tests of the server share: a server on a unix socket, a client that can misbehave, storages that wait."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

from nbdserve.block.node import Node
from nbdserve.exports.export import Export, ExportTable
from nbdserve.formats.raw import RawDriver
from nbdserve.protocol.client import ClientHandshake, Connected, Failed, RemoteExport, Send
from nbdserve.protocol.client_transmission import ClientTransmission, Reply
from nbdserve.protocol.codec import EXTENDED
from nbdserve.protocol.constants import IHAVEOPT, OPT_EXPORT_NAME, REQUEST_MAGIC
from nbdserve.server.server import Server, ServerLimits
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.storage.memory import MemoryStorage

PATIENCE = 60.0
"""Seconds after which a test gives up waiting."""


class Gated(MemoryStorage):
    """Never answers at once; each operation waits until the gate is open."""

    def __init__(self, content: ReadBuffer = b"", *, size: int | None = None) -> None:
        super().__init__(content, size=size, path="gated")
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.flush_error: OSError | None = None

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return False

    async def _pass(self) -> None:
        self.waiting += 1
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        finally:
            self.waiting -= 1

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._pass()
        super().try_read_into(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await self._pass()
        super().try_write(offset, data)

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        await self._pass()
        for offset, data in pieces:
            super().try_write(offset, data)

    async def flush(self) -> None:
        await self._pass()
        if self.flush_error is not None:
            raise self.flush_error


def raw(storage: Storage, *, read_only: bool = False, **policy: object) -> Node:
    """A raw disk on a storage."""
    return Node([RawDriver(storage, 0, storage.size, read_only=read_only)], **policy)  # type: ignore[arg-type]


class Served:
    """A running server, and where it listens."""

    def __init__(self, server: Server, path: str, listener: socket.socket) -> None:
        self.server = server
        self.path = path
        self.listener = listener

    async def connect(self, name: str = "", *, mode: int = EXTENDED, contexts: Sequence[str] = ()) -> Client:
        return await Client.connect(self.path, name, mode=mode, contexts=contexts)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    folder: Path,
    *exports: Node | Export,
    limits: ServerLimits | None = None,
    on_last_client: Callable[[], None] = lambda: None,
    backlog: int = 2048,
) -> AsyncIterator[Served]:
    """Serve nodes (under the names ``a``, ``b``, ...) or exports."""
    table = ExportTable()
    for letter, export in zip("abcdefgh", exports, strict=False):
        table.add(export if isinstance(export, Export) else Export(letter, export))
    listener = socket.socket(socket.AF_UNIX)
    path = str(folder / "nbd.sock")
    listener.bind(path)
    listener.listen(backlog)
    server = Server(table, limits, on_last_client=on_last_client)
    await server.listen(listener)
    try:
        yield Served(server, path, listener)
    finally:
        await server.stop(1)
        listener.close()


class Client:
    """One connection, in the client role. Replies are taken when asked for, not before."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.export: RemoteExport
        self.transmission: ClientTransmission
        self._replies: dict[int, Reply] = {}
        self._order: list[int] = []

    @classmethod
    async def open(cls, path: str) -> Self:
        """Connect, and say nothing."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, path), PATIENCE)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    @classmethod
    async def connect(cls, path: str, name: str = "", *, mode: int = EXTENDED, contexts: Sequence[str] = ()) -> Self:
        """Connect and negotiate; the refusal is raised."""
        client = await cls.open(path)
        await client.negotiate(name, mode=mode, contexts=contexts)
        return client

    async def negotiate(self, name: str = "", *, mode: int = EXTENDED, contexts: Sequence[str] = ()) -> None:
        handshake = ClientHandshake.connect(name, highest_mode=mode, contexts=contexts)
        while True:
            for event in handshake.receive(await self.receive()):
                if isinstance(event, Send):
                    await self.send(event.data)
                elif isinstance(event, Failed):
                    self.close()
                    raise event.error
                elif isinstance(event, Connected):
                    self.export = event.export
                    self.transmission = ClientTransmission(
                        event.export.mode, [number for number, _ in event.export.contexts]
                    )
                    self._take(handshake.leftover)
                    return

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), PATIENCE)

    async def receive(self, most: int = 1 << 20) -> bytes:
        """Some bytes; ConnectionError at the end."""
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, most), PATIENCE)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        return data

    async def closed(self) -> bool:
        """Wait for the end of the connection, replies before it are taken; whether it was a clean end."""
        try:
            while True:
                self._take(await self.receive())
        except ConnectionResetError as error:
            return "the server closed" in str(error)

    def _take(self, data: bytes) -> None:
        for event in self.transmission.receive(data):
            assert not isinstance(event, Failed), f"the server broke the protocol: {event.error}"
            self._replies[event.cookie] = event
            self._order.append(event.cookie)

    async def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: bytes = b"",
        only: Sequence[int] = (),
    ) -> int:
        """Send a request; its cookie."""
        cookie, head = self.transmission.request(command, offset, length or len(data), flags=flags, only=only)
        await self.send(head + data)
        return cookie

    async def reply(self, cookie: int) -> Reply:
        """Wait for the one final reply to a request."""
        while cookie not in self._replies:
            self._take(await self.receive())
        return self._replies.pop(cookie)

    async def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: bytes = b"",
        only: Sequence[int] = (),
    ) -> Reply:
        """A request and its reply."""
        return await self.reply(await self.request(command, offset, length, flags=flags, data=data, only=only))

    @property
    def unanswered(self) -> int:
        return len(list(self.transmission.in_flight))

    def close(self) -> None:
        self.sock.close()


async def old_style(sock: socket.socket, name: bytes = b"") -> None:
    """The shortest way into transmission (EXPORT_NAME, simple replies), for clients that are many."""
    loop = asyncio.get_running_loop()
    await read_exactly(sock, 18)
    await loop.sock_sendall(sock, struct.pack(">IQII", 3, IHAVEOPT, OPT_EXPORT_NAME, len(name)) + name)
    await read_exactly(sock, 10)


async def read_exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, length - len(data)), PATIENCE)
        if not piece:
            raise ConnectionResetError("closed early")
        data += piece
    return data


def simple_request(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length)


def resident() -> int:
    """Bytes of memory this process has in use (RSS)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def io_error() -> OSError:
    return OSError(errno.EIO, "the disk is gone")
