"""Clients that negotiate next to nothing, and nbd-client."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.tools import make_disk, tool

READ, WRITE, DISCONNECT, FLUSH = range(4)


class PlainClient:
    """EXPORT_NAME and simple replies: the least a server must serve."""

    def __init__(self, connected: socket.socket, name: bytes, client_flags: int) -> None:
        self._socket = connected
        assert self._take(16) == b"NBDMAGICIHAVEOPT"
        (server_flags,) = struct.unpack(">H", self._take(2))
        assert server_flags & 3 == 3
        connected.sendall(struct.pack(">I", client_flags) + b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
        self.size, self.flags = struct.unpack(">QH", self._take(10))
        if not client_flags & 2:  # without NO_ZEROES
            assert self._take(124) == bytes(124)

    def request(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> tuple[int, bytes]:
        """The errno and the data of the reply."""
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 77, offset, length or len(data)) + data)
        if kind == DISCONNECT:
            return 0, self._socket.recv(1)
        magic, error, cookie = struct.unpack(">IIQ", self._take(16))
        assert (magic, cookie) == (0x67446698, 77)
        return error, self._take(length) if kind == READ and not error else b""

    def _take(self, length: int) -> bytes:
        taken = b""
        while len(taken) < length:
            piece = self._socket.recv(length - len(taken))
            assert piece, "the server closed the connection"
            taken += piece
        return taken


@pytest.mark.parametrize("client_flags", [0, 1, 3])
@pytest.mark.parametrize("tcp", [False, True])
def test_export_name_and_simple_replies(
    serve: Serve, tmp_path: Path, content: bytes, client_flags: int, tcp: bool
) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    with serve(image, image_format, "-x", "disk", tcp=tcp) as server, server.connect() as connected:
        client = PlainClient(connected, b"disk", client_flags)
        assert client.size == len(content)
        assert client.flags & 1
        assert client.request(READ, 1 << 20, 3 << 20) == (0, content[1 << 20 : 4 << 20])
        assert client.request(WRITE, 5, data=b"hello") == (0, b"")
        assert client.request(READ, len(content), 512)[0] == 22
        assert client.request(FLUSH) == (0, b"")
        assert client.request(READ, 0, 16) == (0, content[:5] + b"hello" + content[10:16])
        assert client.request(DISCONNECT) == (0, b"")


def test_an_unknown_export_name_closes_the_connection(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "raw", content)
    with serve(image, image_format, "-x", "disk") as server:
        with server.connect() as connected, pytest.raises((AssertionError, ConnectionResetError)):
            PlainClient(connected, b"other", 3)
        with server.connect() as connected:
            assert PlainClient(connected, b"disk", 3).size == len(content)


def test_nbd_client_lists(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "raw", content)
    with serve(image, image_format, "-x", "some-disk", tcp=True) as server:
        host, port = server.address.split(":")
        assert "some-disk" in tool("nbd-client", "-l", host, port)
