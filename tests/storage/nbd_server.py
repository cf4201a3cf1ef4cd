"""An NBD server that misbehaves on demand. It speaks the oldest newstyle, which every client must cope with."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.protocol.constants import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXPORT_HAS_FLAGS,
    EXPORT_SEND_FLUSH,
    IHAVEOPT,
    NBDMAGIC,
    SIMPLE_REPLY_MAGIC,
)
from nbdserve.storage.nbd_target import NbdTarget

REQUEST = struct.Struct(">IHHQQI")


class DropError(Exception):
    """The connection is to be cut, without a reply."""


@dataclass
class Unruly:
    """``rule(command, offset, length)`` is asked for each request: an error number for the reply, bytes to send in its
    place, None to serve it; or it raises DropError."""

    path: Path
    content: bytearray = field(default_factory=lambda: bytearray(1 << 20))
    flags: int = EXPORT_HAS_FLAGS | EXPORT_SEND_FLUSH
    rule: Callable[[int, int, int], int | bytes | None] = lambda command, offset, length: None
    greeting: bytes = struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 0)
    size: int | None = None
    requests: list[tuple[int, int, int]] = field(default_factory=list)
    connections: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def target(self, **more: float) -> NbdTarget:
        return NbdTarget("disk", socket=str(self.path), **more)  # type: ignore[arg-type]

    @property
    def writes(self) -> list[tuple[int, int]]:
        return [(offset, length) for command, offset, length in self.requests if command == CMD_WRITE]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with suppress(DropError, ConnectionError, asyncio.IncompleteReadError):
            writer.write(self.greeting)
            _, _, length = struct.unpack(">4xQII", await reader.readexactly(20))
            await reader.readexactly(length)
            size = len(self.content) if self.size is None else self.size
            writer.write(struct.pack(">QH124x", size, self.flags))
            while True:
                await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, _, command, cookie, offset, length = REQUEST.unpack(await reader.readexactly(REQUEST.size))
        data = await reader.readexactly(length) if command == CMD_WRITE else b""
        if command == CMD_DISC:
            raise DropError
        self.requests.append((command, offset, length))
        outcome = self.rule(command, offset, length)
        if isinstance(outcome, bytes):
            writer.write(outcome)
            return
        writer.write(struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, outcome or 0, cookie))
        if outcome is None:
            if command == CMD_WRITE:
                self.content[offset : offset + length] = data
            elif command == CMD_WRITE_ZEROES:
                self.content[offset : offset + length] = bytes(length)
            elif command == CMD_READ:
                writer.write(self.content[offset : offset + length])
            else:
                assert command == CMD_FLUSH

    def drop(self) -> None:
        """Cut every connection."""
        for writer in self.writers:
            writer.close()
        self.writers.clear()


@asynccontextmanager
async def listening(server: Unruly) -> AsyncIterator[Unruly]:
    """The server takes connections; none at the end."""
    listener = await asyncio.start_unix_server(server.serve, server.path)
    try:
        yield server
    finally:
        listener.close()
        server.drop()
        server.path.unlink(missing_ok=True)
        await asyncio.sleep(0)
