"""The server: accepts clients on listening sockets, bounds them, and stops cleanly."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbdserve.exports.export import Export, ExportTable
from nbdserve.server.budget import DEFAULT_LIMIT, Budget
from nbdserve.server.connection import Connection
from nbdserve.server.payloads import Buffers
from nbdserve.units import KIB

log = logging.getLogger(__name__)

_ACCEPTS_PER_TURN: Final = 32
_OUT_OF_DESCRIPTORS_PAUSE: Final = 0.5
_LEAST_MOVED: Final = 256 * KIB
"""What a client must send of its payload or read of its replies in 10 s, once others wait for the memory."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds that keep clients from wearing the server out."""

    handshake_seconds: float = 10.0
    """From connect to transmission, in all: a byte a second does not extend it (CVE-2024-7409)."""
    max_handshakes: int = 100
    """Clients in negotiation at a time; the oldest makes room for a new one."""
    max_clients: int = 0
    """Clients at a time (qemu-nbd ``--shared``); further ones wait in the backlog of the socket. 0: any number."""
    request_memory: int = DEFAULT_LIMIT
    """Bytes that the requests and replies of all clients take together; further large ones wait."""


@dataclass(slots=True)
class Places:
    """How many more clients the sockets take that share these."""

    free: int


class Server:
    """Listens and holds the connections. ``on_last_client`` is called when the last client in transmission has left."""

    def __init__(
        self,
        exports: ExportTable,
        limits: ServerLimits | None = None,
        *,
        on_last_client: Callable[[], None] = lambda: None,
    ) -> None:
        self.exports = exports
        self.limits = limits or ServerLimits()
        self.buffers = Buffers(Budget(self.limits.request_memory, self._drop_idling))
        self.stopping = False
        self._on_last_client = on_last_client
        self._sockets: list[socket.socket] = []
        self._accepting = False
        self._negotiating: OrderedDict[Connection, asyncio.TimerHandle] = OrderedDict()
        self._clients: set[Connection] = set()
        self._connecting = 0
        self._limited: dict[socket.socket, Places] = {}
        self._places: dict[Connection, Places] = {}
        self._gone: asyncio.Event = asyncio.Event()

    @property
    def connections(self) -> int:
        """Clients in transmission."""
        return len(self._clients)

    async def listen(self, sock: socket.socket, places: Places | None = None) -> None:
        """Serve clients of ``sock``, which is bound and listening; the caller keeps owning it.

        With ``places``, no more than those of the sockets that share them; further ones wait in the backlog.
        """
        sock.setblocking(False)
        if places is not None:
            self._limited[sock] = places
        self._sockets.append(sock)
        if self._accepting or len(self._sockets) == 1:
            self._accepting = True
            asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def unlisten(self, sock: socket.socket) -> None:
        """Accept no more clients of ``sock``; those that are there stay."""
        self._sockets.remove(sock)
        self._limited.pop(sock, None)
        if self._accepting:
            asyncio.get_running_loop().remove_reader(sock.fileno())

    def _set_accepting(self, accepting: bool) -> None:
        if accepting == self._accepting:
            return
        self._accepting = accepting
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            if accepting:
                loop.add_reader(sock.fileno(), self._accept, sock)
            else:
                loop.remove_reader(sock.fileno())

    def _has_room(self) -> bool:
        total = self._connecting + len(self._negotiating) + len(self._clients)
        return not self.limits.max_clients or total < self.limits.max_clients

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            if not self._has_room():
                self._set_accepting(False)
                return
            places = self._limited.get(listener)
            if places is not None and not places.free:
                asyncio.get_running_loop().remove_reader(listener.fileno())
                return
            try:
                sock, address = listener.accept()
                try:
                    output = sock.dup()
                except OSError:
                    sock.close()
                    raise
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("no further client can be accepted for now: %s", error)
                self._set_accepting(False)
                asyncio.get_running_loop().call_later(_OUT_OF_DESCRIPTORS_PAUSE, self._set_accepting, True)
                return
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unix client"
            self._connecting += 1
            if places is not None:
                places.free -= 1
            task = asyncio.get_running_loop().create_task(self._connect(sock, output, peer, places))
            task.add_done_callback(lambda done: done.exception())

    async def _connect(self, sock: socket.socket, output: socket.socket, peer: str, places: Places | None) -> None:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        connection = Connection(self, peer, output)
        if places is not None:
            self._places[connection] = places
        try:
            await loop.connect_accepted_socket(lambda: connection, sock)
        except OSError as error:
            log.debug("%s: gone before it was served: %s", peer, error)
            sock.close()
            output.close()
            self._give_place(connection)
            return
        finally:
            self._connecting -= 1
            self._resume_accepting()
        if self.stopping:
            connection.abort()
        if connection.session is not None or connection.lost or self.stopping:
            return
        while len(self._negotiating) >= self.limits.max_handshakes:
            oldest = next(iter(self._negotiating))
            log.info("%s: dropped: %d clients are in negotiation", oldest.peer, self.limits.max_handshakes)
            self._negotiating.pop(oldest).cancel()
            oldest.abort()
        self._negotiating[connection] = loop.call_later(self.limits.handshake_seconds, self._too_slow, connection)

    def _too_slow(self, connection: Connection) -> None:
        log.info("%s: dropped: no handshake in %g seconds", connection.peer, self.limits.handshake_seconds)
        self._negotiating.pop(connection, None)
        connection.abort()

    def drop_clients(self, export: Export) -> None:
        """Abort the connections that use ``export``; what they have in flight is finished, and nobody hears of it."""
        for connection in list(self._clients):
            if connection.session is not None and connection.session.export is export:
                connection.abort()

    def drain_clients(self, export: Export) -> None:
        """Answer what those who use ``export`` ask from now on with ESHUTDOWN, and let them go when all is answered."""
        for connection in list(self._clients):
            if connection.session is not None and connection.session.export is export:
                connection.drain()

    def _drop_idling(self, first: bool) -> None:
        """Clients wait for memory that others hold without sending the rest, or reading their replies."""
        for connection in list(self._clients):
            if connection.session is not None and connection.session.is_idling(_LEAST_MOVED) and not first:
                log.info("%s: dropped: it holds memory that other clients wait for", connection.peer)
                connection.abort()

    def clients(self) -> list[tuple[str, str]]:
        """Those in transmission: the peer, and the name of its export."""
        return [(each.peer, each.session.export.name) for each in self._clients if each.session is not None]

    def entered(self, connection: Connection) -> None:
        """``connection`` has entered transmission."""
        timer = self._negotiating.pop(connection, None)
        if timer is not None:
            timer.cancel()
        self._clients.add(connection)
        assert connection.session is not None
        connection.session.export.connections += 1

    def forget(self, connection: Connection) -> None:
        """``connection`` is closed."""
        timer = self._negotiating.pop(connection, None)
        if timer is not None:
            timer.cancel()
        self._give_place(connection)
        was_client = connection in self._clients
        if was_client:
            self._clients.discard(connection)
            assert connection.session is not None
            export = connection.session.export
            export.connections -= 1
            if not export.connections:
                export.on_idle()
        self._resume_accepting()
        if was_client and not self._clients:
            self._gone.set()
            self._on_last_client()

    def _give_place(self, connection: Connection) -> None:
        places = self._places.pop(connection, None)
        if places is None:
            return
        places.free += 1
        for sock in self._sockets if self._accepting else ():
            if self._limited.get(sock) is places:
                asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _resume_accepting(self) -> None:
        if not self.stopping and self._has_room():
            self._set_accepting(True)

    async def stop(self, drain: float = 10.0) -> None:
        """Stop accepting; finish what is in flight for at most ``drain`` seconds; close every connection."""
        self.stopping = True
        self._set_accepting(False)
        self._sockets.clear()
        for connection in list(self._negotiating):
            connection.abort()
        self._gone.clear()
        for connection in list(self._clients):
            connection.drain()
        if self._clients:
            try:
                await asyncio.wait_for(self._gone.wait(), drain)
            except TimeoutError:
                log.warning("%d clients were not done after %g seconds and are dropped", len(self._clients), drain)
        for connection in list(self._clients):
            connection.abort()
