"""One TCP or unix-socket client: the asyncio side of the handshake and of the session."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from nbdserve.errors import ProtocolError
from nbdserve.exports.export import Export
from nbdserve.protocol.handshake import Close, Negotiated, Send, ServerHandshake
from nbdserve.server.output import SEND_BUFFER, Output
from nbdserve.server.session import Session

if TYPE_CHECKING:
    from nbdserve.server.server import Server

log = logging.getLogger(__name__)

_EMPTY_POLLS: Final = 5
"""Attempts, 1.4 us each."""
_MOST_POLLED: Final = 64 if len(os.sched_getaffinity(0)) > 1 else 0
"""Then the other clients have their turn. On a single CPU the peer could not go on meanwhile."""
_LONGEST_TURN: Final = 0.002
"""Seconds, after which they have it sooner: batches of long writes, or of encrypted reads, take their time."""
_LONGEST_YIELD: Final = 0.001
"""Seconds. 16 writes of 64 KiB take a client half of it."""
_YIELD_PAUSE: Final = 0.1
_GIVE_UP: Final = 16
_TRY_AGAIN: Final = 32


class Connection(asyncio.BufferedProtocol):
    """Bytes arrive in the shared receive buffer, go through the handshake, then through the session."""

    def __init__(self, server: Server, peer: str, output: socket.socket) -> None:
        """``output`` is a duplicate of the socket, to send on; the connection closes it."""
        self.peer = peer
        self.session: Session | None = None
        self._server = server
        self._transport: asyncio.Transport
        output.setblocking(False)
        if output.family == socket.AF_UNIX:
            output.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        else:  # the kernel sizes the buffer of a TCP socket as it goes
            output.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._output = Output(output, asyncio.get_running_loop(), self._drained, self._failed, server.buffers.budget)
        self._handshake: ServerHandshake | None = None
        self.lost = False
        self._polls_in_vain = 0
        self._yields_again = 0.0

    # --- asyncio ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._handshake = ServerHandshake(self._server.exports, shutting_down=lambda: self._server.stopping)
        self._output.send(self._handshake.greeting())

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.session is not None:
            return self.session.parser.get_buffer()
        return self._server.buffers.receive.view

    def buffer_updated(self, nbytes: int) -> None:
        try:
            if self.session is not None:
                began = len(self.session.tasks)
                self.session.parser.received(nbytes)
                self.session.process()
                self._poll(self.session, began)
            else:
                self._negotiate(bytes(self._server.buffers.receive.view[:nbytes]))
        except Exception as error:
            self._drop(error)

    def _poll(self, session: Session, began: int) -> None:
        """Look for the next request before sleeping in the kernel: one that comes at once costs neither side a wake-up.

        At queue depth 1 that is 31 % more requests a second (fio, 4 KiB random reads, two CPUs).

        After 16 times in vain it is done one time in 32. It ends when there are more than ``began`` tasks: a flush that
        was asked for begins before what comes behind it is looked at.
        """
        parser = session.parser
        if self._polls_in_vain >= _GIVE_UP and self._polls_in_vain % _TRY_AGAIN and not parser.is_cut:
            self._polls_in_vain += 1
            return
        misses = 0
        until = monotonic() + _LONGEST_TURN
        for _ in range(_MOST_POLLED):
            if not session.reading or session.parser.disconnected or self.lost or len(session.tasks) > began:
                return
            while (count := self._output.receive_into(session.parser.get_buffer())) < 0:
                misses += 1
                if misses > _EMPTY_POLLS:
                    self._polls_in_vain += 1
                    return
                if parser.is_cut and not self._let_client_send():
                    return
            if not count:  # the end of the stream, which the transport finds, too
                return
            self._polls_in_vain = misses = 0
            session.parser.received(count)
            session.process()
            if monotonic() > until:
                return

    def _let_client_send(self) -> bool:
        """Let whoever waits for this CPU have it; False when that is not to be done now.

        A client that sends a header and its payload with two calls is often woken on this CPU, where its first call
        wakes this process before the second. Were this process to sleep until that, too, there would be two wake-ups
        for each write and never two requests to be read at a time: 14 % fewer first writes a second (fio, 4 KiB at
        queue depth 16). When others than the client use the CPU, they are not let in again soon.
        """
        began = monotonic()
        if began < self._yields_again:
            return False
        os.sched_yield()
        ended = monotonic()
        if ended - began > _LONGEST_YIELD:
            self._yields_again = ended + _YIELD_PAUSE
        return True

    def eof_received(self) -> bool:
        if self.session is None:
            return False
        self.session.finish()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._output.close()
        if self.session is not None:
            self.session.lost()
        self._server.forget(self)

    # --- life cycle ------------------------------------------------------------------------------------------------

    def _negotiate(self, data: bytes) -> None:
        assert self._handshake is not None
        for event in self._handshake.receive(data):
            if isinstance(event, Send):
                self._output.send(event.data)
            elif isinstance(event, Negotiated):
                self._begin_session(event, self._handshake.leftover)
                self._handshake = None
                return
            elif isinstance(event, Close):
                log.log(logging.INFO if event.violation else logging.DEBUG, "%s: %s", self.peer, event.reason)
                self._close_when_sent()
                return

    def _begin_session(self, negotiated: Negotiated, leftover: bytes) -> None:
        session = Session(
            cast("Export", negotiated.export),
            negotiated,
            self._output,
            self._server.buffers,
            set_reading=self._set_reading,
            on_idle=self._session_idle,
            on_error=self._drop,
        )
        self.session = session
        self._server.entered(self)
        if leftover:
            session.parser.feed(leftover)
            session.process()

    def _set_reading(self, reading: bool) -> None:
        if self._transport.is_closing():
            return
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _drained(self) -> None:
        if self.session is not None:
            self.session.resume()
        elif self._handshake is None or self._transport.is_closing():
            self._transport.close()

    def _drop(self, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            log.info("%s: dropped: %s", self.peer, error)
        else:
            log.error("%s: dropped by an unforeseen error", self.peer, exc_info=error)
        self.abort()

    def _failed(self, error: OSError) -> None:
        log.debug("%s: %s", self.peer, error)
        self.abort()

    def _session_idle(self) -> None:
        if not self.lost:
            self._transport.close()

    def _close_when_sent(self) -> None:
        self._handshake = None
        self._transport.pause_reading()
        if not self._output.backlog:
            self._transport.close()

    def drain(self) -> None:
        """The server stops: new requests get ESHUTDOWN, and the connection closes when its work is done."""
        if self.session is None:
            self._transport.close()
        else:
            self.session.draining = True
            self.session.finish()

    def abort(self) -> None:
        """Drop the connection now; work under way is finished, and nobody hears of it."""
        self._output.close()
        self._transport.abort()
