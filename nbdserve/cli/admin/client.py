"""A client of the admin socket that waits for its answers."""

from __future__ import annotations

import difflib
import json
import os
import re
import select
import socket
from collections.abc import Mapping
from typing import Any, Final, Self

from nbdserve.admin.codec import JsonStream
from nbdserve.admin.errors import COMMAND_NOT_FOUND
from nbdserve.errors import ConfigError, NbdserveError
from nbdserve.server.addresses import TcpAddress, parse_address, unix_address

ENVIRONMENT: Final = "NBDSERVE_ADMIN"
"""The environment variable with the address, where none is given."""
_ADDRESS: Final = re.compile(r"unix:.*|[^/]*:\d+", re.DOTALL)
_CHUNK: Final = 1 << 16
_LIST: Final = "query-commands"


class VerbError(NbdserveError):
    """The server refuses a verb, or fails at it."""


class GoneError(NbdserveError):
    """The server has closed the connection."""

    def __init__(self) -> None:
        super().__init__("the server is gone")


class AdminClient:
    """A connection that has negotiated. ``events`` gathers what the server tells meanwhile."""

    def __init__(self, address: str) -> None:
        """``address``: the path of a unix socket, or ``HOST:PORT``. ConfigError when nobody answers there."""
        self.events: list[dict[str, Any]] = []
        self._stream = JsonStream()
        self._waiting: list[dict[str, Any]] = []
        try:
            self._sock = _connect(address)
            greeting = self._next()
            self.version = greeting["QMP"]["version"]
            self.execute("qmp_capabilities")
        except (OSError, GoneError, KeyError) as error:
            problem = getattr(error, "strerror", None) or "no admin socket of a server"
            raise ConfigError(f"{address}: {problem}; start it with: nbdserve serve --admin SOCK") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def execute(self, verb: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The result. VerbError with the server's words, and with similar verbs where there is none; GoneError."""
        request: dict[str, Any] = {"execute": verb}
        if arguments:
            request["arguments"] = dict(arguments)
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError:
            raise GoneError from None
        while "event" in (message := self._next()):
            self.events.append(message)
        if "error" not in message:
            return message["return"]
        problem = message["error"]["desc"]
        if message["error"]["class"] == COMMAND_NOT_FOUND and verb != _LIST:
            similar = difflib.get_close_matches(verb, [each["name"] for each in self.execute(_LIST)])
            problem += f"; did you mean {' or '.join(similar)}?" if similar else f"; {_LIST} lists those there are"
        raise VerbError(problem)

    def poll(self) -> None:
        """Take up what the server has told in the meantime. GoneError."""
        while select.select([self._sock], [], [], 0)[0]:
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while not self._waiting:
            try:
                data = self._sock.recv(_CHUNK)
            except ConnectionError:
                data = b""
            if not data:
                raise GoneError
            for value in self._stream.feed(data):
                if not isinstance(value, dict):
                    raise ConfigError(f"no admin socket: it says {value!r}")
                self._waiting.append(value)
        return self._waiting.pop(0)


def address_or_default(given: str | None) -> str:
    """The address to connect to. ConfigError when there is none."""
    address = given or os.environ.get(ENVIRONMENT)
    if not address:
        raise ConfigError(f"which server? give --socket SOCK, or set {ENVIRONMENT}")
    return address


def _connect(address: str) -> socket.socket:
    parsed = parse_address(address) if _ADDRESS.fullmatch(address) else unix_address(address)
    if isinstance(parsed, TcpAddress):
        return socket.create_connection((parsed.host.strip("[]"), parsed.port))
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(parsed.sockaddr())
    except OSError:
        sock.close()
        raise
    return sock
