"""The admin socket: any number of clients, each with its own greeting and negotiation.

A unix socket has mode 0600: whoever may open it may do everything. TCP has no such guard and is bound to the loopback
addresses only. A client's commands run one after the other; those of different clients do not wait for each other.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

from nbdserve.admin.codec import JsonStream, encode
from nbdserve.admin.command import Commands
from nbdserve.admin.control import Control
from nbdserve.admin.session import Session
from nbdserve.errors import ConfigError
from nbdserve.server.addresses import Address, TcpAddress
from nbdserve.server.listeners import Listener, bind

log = logging.getLogger(__name__)

READ_BYTES: Final = 1 << 16
MAX_UNSENT: Final = 4 << 20
"""Bytes of events a client may leave unread before it is dropped."""
_LAST_WORDS_SECONDS: Final = 1.0
_OWNER_ONLY: Final = 0o177
_CREDENTIALS: Final = struct.Struct("3i")


def bind_admin(addresses: Sequence[Address]) -> list[Listener]:
    """Listen on each address. ConfigError for TCP that others could reach, and for what ``bind`` refuses."""
    listeners: list[Listener] = []
    try:
        for address in addresses:
            if isinstance(address, TcpAddress) and not _is_loopback(address.host):
                raise ConfigError(
                    f"admin socket {address}: whoever connects may do everything, so TCP is for 127.0.0.1 and ::1 only"
                )
            before = os.umask(_OWNER_ONLY)
            try:
                listeners += bind(address)
            finally:
                os.umask(before)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AdminServer:
    """Clients of the admin sockets. ``close`` ends their connections, not what they have begun."""

    def __init__(self, control: Control, commands: Commands) -> None:
        self._control = control
        self._commands = commands
        self._servers: list[asyncio.Server] = []
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def listen(self, listener: Listener) -> None:
        """Serve the clients of a bound socket, whose file its owner removes."""
        start: Any = asyncio.start_unix_server if listener.sock.family == socket.AF_UNIX else asyncio.start_server
        self._servers.append(await start(self._accepted, sock=listener.sock.dup(), limit=READ_BYTES))

    async def close(self) -> None:
        """Tell everyone that it ends, accept nobody any more, and close every connection.

        A command that waits is abandoned; a job goes on without the client that began it.
        """
        self._control.announce_end()
        for server in self._servers:
            server.close()
        clients = dict(self._clients)
        for task in clients:
            task.cancel()
        if clients:
            await asyncio.wait(clients)
            await asyncio.wait({asyncio.ensure_future(_closed(writer)) for writer in clients.values()})

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = writer
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # it is gone, or the server ends
        except Exception:
            log.exception("a fault of the server in a conversation with an admin client")
        finally:
            del self._clients[task]
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(self._control, self._commands, peer_of(writer))
        stream = JsonStream()

        def tell(event: dict[str, Any]) -> None:
            if writer.transport.is_closing():
                return
            writer.write(encode(event))
            if writer.transport.get_write_buffer_size() > MAX_UNSENT:
                log.warning("%s: dropped: it does not read what it is told", session.peer)
                writer.transport.abort()

        log.info("%s: connected", session.peer)
        writer.write(encode(session.greeting()))
        try:
            while data := await reader.read(READ_BYTES):
                for message in stream.feed(data):
                    was_negotiated = session.negotiated
                    writer.write(encode(await session.answer(message)))
                    if session.negotiated and not was_negotiated:
                        self._control.events.subscribe(tell)
                    await writer.drain()
        finally:
            self._control.events.unsubscribe(tell)
            log.info("%s: disconnected", session.peer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    """What is still to be sent is sent, if the peer reads it soon."""
    try:
        await asyncio.wait_for(writer.wait_closed(), _LAST_WORDS_SECONDS)
    except (OSError, TimeoutError):
        writer.transport.abort()


def peer_of(writer: asyncio.StreamWriter) -> str:
    """Who the client is: user and process of a unix socket (SO_PEERCRED), address of a TCP connection."""
    sock = writer.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return f"admin uid={uid} pid={pid}"
    host, port = writer.get_extra_info("peername")[:2]
    return f"admin {host}:{port}"
