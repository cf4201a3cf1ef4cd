"""A blocking NBD client for the command line: ``--list`` and ``demo --once``."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from nbdserve.errors import ConfigError, ProtocolError
from nbdserve.protocol.client import (
    ClientHandshake,
    Connected,
    Described,
    Failed,
    Listed,
    RemoteExport,
    Send,
)
from nbdserve.protocol.client_transmission import ClientTransmission, Reply
from nbdserve.protocol.constants import CMD_BLOCK_STATUS, CMD_READ
from nbdserve.server.addresses import Address, UnixAddress

TIMEOUT_SECONDS: Final = 30.0
"""A server that is silent for so long is given up."""
_RECEIVE_SIZE: Final = 1 << 18


def list_exports(address: Address) -> tuple[tuple[str, str], ...]:
    """Names and descriptions of the exports at ``address``."""
    with _connect(address) as sock:
        listed = _negotiate(sock, ClientHandshake.list_exports())
    assert isinstance(listed, Listed)
    return listed.exports


def describe(address: Address, name: str) -> RemoteExport:
    """What the server says of one export; ``contexts`` are those on offer. OptionError when it refuses."""
    with _connect(address) as sock:
        described = _negotiate(sock, ClientHandshake.info(name))
    assert isinstance(described, Described)
    return described.export


class Client:
    """A connection in the transmission phase."""

    def __init__(self, address: Address, name: str = "", contexts: tuple[str, ...] = ("base:allocation",)) -> None:
        self._sock = _connect(address)
        try:
            handshake = ClientHandshake.connect(name, contexts=contexts)
            connected = _negotiate(self._sock, handshake)
        except BaseException:
            self._sock.close()
            raise
        assert isinstance(connected, Connected)
        self.export = connected.export
        self._transmission = ClientTransmission(self.export.mode, [number for number, _ in self.export.contexts])

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``. OSError when the server fails the request."""
        return bytes(self._request(CMD_READ, offset, length).data)

    def block_status(self, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
        """``(length, status)`` extents from ``offset`` by context name; at least one each."""
        extents = self._request(CMD_BLOCK_STATUS, offset, length).extents
        return {name: extents[number] for number, name in self.export.contexts}

    def close(self) -> None:
        """Say goodbye, if the server is still there, and close."""
        with self._sock, contextlib.suppress(OSError):
            self._sock.sendall(self._transmission.disconnect())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, command: int, offset: int, length: int) -> Reply:
        _, request = self._transmission.request(command, offset, length)
        self._sock.sendall(request)
        for data in _received(self._sock):
            for event in self._transmission.receive(data):
                if isinstance(event, Failed):
                    raise event.error
                if event.error:
                    raise OSError(event.error, event.message or f"the server refused the request ({event.error})")
                return event
        raise ProtocolError("the server closed the connection before its reply")


def _connect(address: Address) -> socket.socket:
    try:
        if isinstance(address, UnixAddress):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(TIMEOUT_SECONDS)
            sock.connect(address.sockaddr())
            return sock
        return socket.create_connection((address.host, address.port), TIMEOUT_SECONDS)
    except OSError as error:
        raise ConfigError(f"cannot connect to {address}: {error.strerror or error}") from error


def _negotiate(sock: socket.socket, handshake: ClientHandshake) -> Connected | Described | Listed:
    for data in _received(sock):
        for event in handshake.receive(data):
            if isinstance(event, Send):
                sock.sendall(event.data)
            elif isinstance(event, Failed):
                raise event.error
            else:
                return event
    raise ProtocolError("the server closed the connection during the handshake")


def _received(sock: socket.socket) -> Iterator[bytes]:
    """What arrives, until the server closes."""
    while data := sock.recv(_RECEIVE_SIZE):
        yield data
