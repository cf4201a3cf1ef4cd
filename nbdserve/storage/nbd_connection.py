"""One connection to an NBD server: the sans-IO client role of the protocol on a socket of the event loop.

The server is not trusted: what breaks the protocol ends the connection, and so does silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from typing import Final, cast

from nbdserve.errors import NbdserveError, OptionError, ProtocolError
from nbdserve.protocol.client import ClientHandshake, Connected, Failed, RemoteExport, Send
from nbdserve.protocol.client_transmission import ClientTransmission, Reply
from nbdserve.protocol.meta_contexts import BASE_ALLOCATION
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.nbd_target import NbdTarget
from nbdserve.storage.pool import JobFuture
from nbdserve.units import KIB

CONNECT_SECONDS: Final = 10.0
"""To connect and negotiate."""
SILENCE_SECONDS: Final = 120.0
"""A server that owes replies and sends nothing for so long is given up: longer than any flush of a healthy disk."""
_RECEIVE_SIZE: Final = 256 * KIB


class LostError(ConnectionError):
    """The connection ended before the reply; nobody knows whether the request was done."""


class NbdConnection(asyncio.BufferedProtocol):
    """In transmission once ``open`` returns, until ``lost`` says why it ended."""

    export: RemoteExport

    def __init__(self, target: NbdTarget) -> None:
        self.lost: str | None = None
        """Why the connection ended; None while it lives."""
        self.answered = False
        """The server has answered a request."""
        self._buffer = memoryview(bytearray(_RECEIVE_SIZE))
        self._handshake: ClientHandshake | None = ClientHandshake.connect(target.export, contexts=(BASE_ALLOCATION,))
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport
        self._transmission: ClientTransmission
        self._replies: dict[int, JobFuture[Reply]] = {}
        self._heard = False
        self._watch: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, target: NbdTarget) -> NbdConnection:
        """Connect, and enter transmission.

        OSError when the server cannot be reached in time, OptionError when it refuses, ProtocolError when it errs.
        """
        loop = asyncio.get_running_loop()
        connection: NbdConnection | None = None

        def make() -> NbdConnection:
            nonlocal connection
            connection = cls(target)
            return connection

        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                try:
                    if target.socket:
                        await loop.create_unix_connection(make, target.socket_address)
                    else:
                        await loop.create_connection(make, target.host, target.port)
                except OSError as error:
                    if (error.errno or 0) <= 0:  # of the name service, or of several addresses
                        raise
                    raise OSError(error.errno, os.strerror(error.errno or 0)) from error
                assert connection is not None
                await connection._ready
        except TimeoutError:
            _abort(connection)
            raise OSError(errno.ETIMEDOUT, f"no answer within {CONNECT_SECONDS:g} seconds") from None
        except BaseException:
            _abort(connection)
            raise
        return connection

    def request(
        self,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        data: ReadBuffer | None = None,
        into: memoryview | None = None,
    ) -> JobFuture[Reply]:
        """Send a request; its reply, or LostError.

        Until then ``data``, of a write, must stay as it is, and ``into``, for what a read reads, is in use.
        """
        reply: JobFuture[Reply] = JobFuture(loop=asyncio.get_running_loop())
        if self.lost is not None:
            reply.set_exception(LostError(self.lost))
            return reply
        cookie, head = self._transmission.request(command, offset, length, flags=flags, into=into)
        self._replies[cookie] = reply
        if data is None:
            self._transport.write(head)
        else:
            self._transport.writelines((head, data))
        if self._watch is None:
            self._look_later()
        return reply

    def close(self, reason: str = "it was closed") -> None:
        """End the session; what is not answered yet fails."""
        if self.lost is None:
            with contextlib.suppress(Exception):
                self._transport.write(self._transmission.disconnect())
            self._transport.close()
            self._end(reason)

    # --- asyncio -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        sock: socket.socket = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Part of asyncio's protocol."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Part of asyncio's protocol."""
        if self.lost is None:
            self._heard = True
            try:
                self._received(self._buffer[:nbytes])
            except NbdserveError as error:
                self._fail(error)

    def eof_received(self) -> bool:
        """Part of asyncio's protocol: nothing is sent to who does not answer."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio's protocol."""
        self._end(str(exc) if exc is not None else "the server closed the connection")

    # --- the protocol ------------------------------------------------------------------------------------------------

    def _received(self, data: memoryview | bytes) -> None:
        if self._handshake is not None:
            for event in self._handshake.receive(data):
                if isinstance(event, Send):
                    self._transport.write(event.data)
                elif isinstance(event, Failed):
                    raise event.error
                else:
                    assert isinstance(event, Connected)
                    self._connected(event.export, self._handshake.leftover)
            return
        for reply in self._transmission.receive(data):
            if isinstance(reply, Failed):
                raise reply.error
            self.answered = True
            self._replies.pop(reply.cookie).set_result(reply)

    def _connected(self, export: RemoteExport, leftover: bytes) -> None:
        self.export = export
        self._handshake = None
        self._transmission = ClientTransmission(export.mode, [number for number, _ in export.contexts])
        self._ready.set_result(None)
        if leftover:
            self._received(leftover)

    def _fail(self, error: NbdserveError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
        self._transport.abort()
        self._end(str(error))

    def _end(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if not self._ready.done():
            self._ready.set_exception(OSError(errno.ECONNRESET, f"{reason} during the handshake"))
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            reply.set_exception(LostError(reason))

    def _look_later(self) -> None:
        self._heard = False
        self._watch = asyncio.get_running_loop().call_later(SILENCE_SECONDS, self._look)

    def _look(self) -> None:
        self._watch = None
        if self._replies and not self._heard:
            self._transport.abort()
            self._end(f"the server was silent for {SILENCE_SECONDS:g} seconds")
        elif self._replies:
            self._look_later()


def _abort(connection: NbdConnection | None) -> None:
    """Drop a connection that was not, or not fully, made."""
    if connection is not None and hasattr(connection, "_transport"):
        connection._transport.abort()
        connection._end("it was given up")
        with contextlib.suppress(asyncio.CancelledError, OSError, OptionError, ProtocolError):
            connection._ready.exception()
