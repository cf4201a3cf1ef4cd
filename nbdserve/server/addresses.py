"""Addresses a server listens on, as users write them and as NBD URIs (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md).

======================  =====================================================
``127.0.0.1:10809``     TCP, IPv4 address or host name; the port may be left out
``[::1]:10809``         TCP, IPv6 address
``*:10809``             TCP on every IPv4 and IPv6 address
``unix:/path``          unix socket; a relative path is taken from the working directory
``unix:@name``          unix socket in Linux's abstract namespace
======================  =====================================================
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

from nbdserve.errors import ConfigError

DEFAULT_PORT: Final = 10809
"""The port IANA registered for NBD."""

MAX_UNIX_PATH: Final = 107
"""Bytes in ``sun_path``, less the terminating NUL."""

_WILDCARDS: Final = frozenset({"", "*", "0.0.0.0", "::"})


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """``host`` is a name, an IPv4 or IPv6 address, or ``*`` for all of this machine's; port 0: the kernel chooses."""

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{self.port}"

    def uri(self, export: str = "") -> str:
        """The NBD URI a client on this machine connects to."""
        host = "localhost" if self.host in _WILDCARDS else _bracketed(self.host)
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"nbd://{host}{port}{_uri_path(export)}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """``path`` of a unix socket, absolute; a leading ``@`` is the abstract namespace."""

    path: str

    @property
    def abstract(self) -> bool:
        return self.path.startswith("@")

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def uri(self, export: str = "") -> str:
        """The NBD URI to connect to. The URI specification has no form for abstract sockets; ``@`` is kept in front."""
        return f"nbd+unix://{_uri_path(export) or '/'}?socket={quote(self.path, safe='/@')}"

    def sockaddr(self) -> str:
        """What ``bind`` and ``connect`` take."""
        return "\0" + self.path[1:] if self.abstract else self.path


Address: TypeAlias = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """The address written as ``text``; ConfigError names the text and what is wrong with it."""
    if text.startswith("unix:"):
        return unix_address(text.removeprefix("unix:"))
    if text.startswith(("/", "@", "./", "../")):
        raise ConfigError(f"address {text!r}: a unix socket is written unix:{text}")
    host, port_text = _split_host(text)
    if not host:
        raise ConfigError(
            f"address {text!r}: the host is missing; write *:{port_text or DEFAULT_PORT} for every address"
        )
    return TcpAddress(host, parse_port(port_text) if port_text else DEFAULT_PORT)


def unix_address(path: str) -> UnixAddress:
    """A unix socket at ``path``, made absolute; ConfigError when it is empty or does not fit a socket address."""
    if path in {"", "@"}:
        raise ConfigError("unix socket: the path is empty")
    if "\0" in path:
        raise ConfigError(f"unix socket {path!r}: the path contains a NUL")
    if not path.startswith("@"):
        path = str(Path(path).absolute())
    size = len(path.encode(errors="surrogateescape"))
    if size > MAX_UNIX_PATH:
        raise ConfigError(
            f"unix socket {path}: the path has {size} bytes, at most {MAX_UNIX_PATH} fit a socket address"
        )
    return UnixAddress(path)


def parse_port(text: str) -> int:
    """A port number; ConfigError names the text."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise ConfigError(f"port {text!r}: give a number from 0 to 65535")
    return int(text)


def address_of(sock: socket.socket) -> Address:
    """Where a bound socket listens, port and all."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        if isinstance(name, bytes):
            return UnixAddress("@" + name[1:].decode(errors="replace"))
        return UnixAddress(name)
    return TcpAddress(name[0], name[1])


def _split_host(text: str) -> tuple[str, str]:
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ConfigError(f"address {text!r}: write an IPv6 address as [::1]:{DEFAULT_PORT}")
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError(f"address {text!r}: {host!r} is no IPv6 address") from None
        return host, rest[1:]
    if text.count(":") > 1:
        raise ConfigError(f"address {text!r}: write an IPv6 address in brackets, as [::1]:{DEFAULT_PORT}")
    host, _, port = text.partition(":")
    return host, port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _uri_path(export: str) -> str:
    """``/`` and the name, percent-encoded; a name that begins with ``/`` gives ``//`` (URI specification, "path")."""
    return "/" + quote(export, safe="/") if export else ""
