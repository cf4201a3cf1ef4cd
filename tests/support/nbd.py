"""A small NBD client of its own (simple replies, many requests in flight), so that no code of the server judges it."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

from nbdserve.block.writer import WRITE_WAIT, Done

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FLAG_FUA, FLAG_NO_HOLE = 1, 2
OPT_GO, REP_ACK, REP_INFO = 7, 1, 3


class NbdClient:
    """One connection to the default export of a server on a unix socket. Errors are OSError with the NBD errno."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
        self.reader = reader
        self.writer = writer
        self.size = size
        self.cookie = 0
        self.waiting: dict[int, tuple[asyncio.Future[bytes], int]] = {}
        self.receiver = asyncio.create_task(self._receive())

    @classmethod
    async def connect(cls, path: Path) -> NbdClient:
        """Connect and negotiate; ConnectionError or asyncio.IncompleteReadError when that fails."""
        reader, writer = await asyncio.open_unix_connection(str(path))
        magic, option_magic, _ = struct.unpack(">QQH", await reader.readexactly(18))
        if (magic, option_magic) != (0x4E42444D41474943, 0x49484156454F5054):
            raise ConnectionError("no NBD server")
        writer.write(struct.pack(">IQIIIH", 3, option_magic, OPT_GO, 6, 0, 0))
        size = 0
        while True:
            _, option, reply, length = struct.unpack(">QIII", await reader.readexactly(20))
            payload = await reader.readexactly(length)
            if option == OPT_GO and reply == REP_ACK:
                return cls(reader, writer, size)
            if reply != REP_INFO:
                raise ConnectionError(f"refused: {reply:#x} {payload.decode(errors='replace')}")
            if payload[:2] == b"\0\0":
                size = struct.unpack(">Q", payload[2:10])[0]

    async def _receive(self) -> None:
        error: BaseException = ConnectionResetError("the server is gone")
        try:
            while True:
                _, code, cookie = struct.unpack(">IIQ", await self.reader.readexactly(16))
                future, length = self.waiting.pop(cookie)
                data = b"" if code else await self.reader.readexactly(length)
                if not future.done():
                    if code:
                        future.set_exception(OSError(code, f"{os.strerror(code)} (from the server)"))
                    else:
                        future.set_result(data)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for future, _ in self.waiting.values():
                if not future.done():
                    future.set_exception(error)
            self.waiting.clear()

    async def request(self, command: int, offset: int, length: int, *, flags: int = 0, data: bytes = b"") -> bytes:
        """One request; the data of a read."""
        if self.receiver.done():
            raise ConnectionResetError("the server is gone")
        self.cookie += 1
        cookie = self.cookie
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.waiting[cookie] = (future, length if command == READ else 0)
        self.writer.write(struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data)
        await self.writer.drain()
        return await future

    def submit_write(self, offset: int, data: memoryview, done: Done) -> int:
        """A client has no such shortcut."""
        return WRITE_WAIT

    async def read(self, offset: int, length: int) -> bytes:
        return await self.request(READ, offset, length)

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await self.request(WRITE, offset, len(data), flags=FLAG_FUA * fua, data=data)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fua: bool = False) -> None:
        await self.request(WRITE_ZEROES, offset, length, flags=FLAG_FUA * fua | FLAG_NO_HOLE * (not unmap))

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self.request(TRIM, offset, length, flags=FLAG_FUA * fua)

    async def flush(self) -> None:
        await self.request(FLUSH, 0, 0)

    async def close(self) -> None:
        """Leave without a word when the server is gone, with DISC otherwise."""
        if not self.receiver.done():
            self.writer.write(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 0, 0, 0))
        self.writer.close()
        await asyncio.gather(self.receiver, return_exceptions=True)


class Connections:
    """Several connections to one export as one disk: each request goes over the next of them."""

    def __init__(self, clients: list[NbdClient]) -> None:
        self.clients = clients
        self.turn = 0

    @classmethod
    async def connect(cls, path: Path, count: int) -> Connections:
        return cls([await NbdClient.connect(path) for _ in range(count)])

    def _next(self) -> NbdClient:
        self.turn += 1
        return self.clients[self.turn % len(self.clients)]

    def submit_write(self, offset: int, data: memoryview, done: Done) -> int:
        return WRITE_WAIT

    async def read(self, offset: int, length: int) -> bytes:
        return await self._next().read(offset, length)

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await self._next().write(offset, data, fua=fua)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fua: bool = False) -> None:
        await self._next().zero(offset, length, unmap=unmap, fua=fua)

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._next().discard(offset, length, fua=fua)

    async def flush(self) -> None:
        await self._next().flush()

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
