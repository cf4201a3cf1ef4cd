"""Which export of which NBD server: the URIs users write (NBD project, doc/uri.md), and QEMU's older ``nbd:`` form.

=========================================  ==================================================
``nbd://host:port/export``                 TCP; the port may be left out, IPv6 as ``[::1]``
``nbd+unix:///export?socket=/path``        unix socket; ``@name`` is the abstract namespace
``nbd:host:port:exportname=NAME``          QEMU's older form; the export may be left out
``nbd:unix:/path:exportname=NAME``         the same
=========================================  ==================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from nbdserve.errors import ConfigError
from nbdserve.protocol.constants import MAX_STRING

DEFAULT_PORT: Final = 10809
MAX_UNIX_PATH: Final = 107
"""Bytes of a path that fit a socket address."""
SCHEMES: Final = ("nbd", "nbd+tcp", "nbd+unix")
_TLS_SCHEMES: Final = ("nbds", "nbds+tcp", "nbds+unix")
_OLD_EXPORT: Final = ":exportname="
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NbdTarget:
    """An export, and how patiently its server is called. ``socket`` is a path, else ``host`` and ``port`` count."""

    export: str = ""
    host: str = ""
    port: int = DEFAULT_PORT
    socket: str = ""
    reconnect_delay: float = 0.0
    """Seconds for which requests wait for a lost server to come back; 0: they fail at once, and later ones try anew."""
    open_timeout: float = 0.0
    """Seconds for which the first connection is tried again; 0: once."""

    def __post_init__(self) -> None:
        """ConfigError when it cannot be any server's."""
        if bool(self.socket) == bool(self.host):
            raise ConfigError("an NBD server is a host or a unix socket, one of them")
        for what, text in (("export name", self.export), ("host", self.host), ("socket", self.socket)):
            if "\0" in text or len(text.encode(errors="surrogateescape")) > MAX_STRING:
                raise ConfigError(f"NBD {what} {text[:64]!r}: at most {MAX_STRING} bytes, without NUL")
        if len(self.socket.encode(errors="surrogateescape")) > MAX_UNIX_PATH:
            raise ConfigError(f"unix socket {self.socket}: at most {MAX_UNIX_PATH} bytes fit a socket address")

    @property
    def uri(self) -> str:
        """The URI that names it."""
        path = quote(self.export, safe="/")
        if self.socket:
            return f"nbd+unix:///{path}?socket={quote(self.socket, safe='/@')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"nbd://{host}{port}" + (f"/{path}" if path else "")

    @property
    def place(self) -> str:
        """The server, for messages."""
        return self.socket or f"{self.host}:{self.port}"

    @property
    def socket_address(self) -> str:
        """What ``connect`` takes for ``socket``."""
        return "\0" + self.socket[1:] if self.socket.startswith("@") else self.socket


def is_nbd(text: str) -> bool:
    """Whether ``text`` names an NBD export rather than a file; TLS ones too, which are refused later, by name."""
    scheme = text.partition(":")[0].lower()
    return ":" in text and (scheme in SCHEMES or scheme in _TLS_SCHEMES)


def parse_target(text: str) -> NbdTarget:
    """The export that ``text`` names; ConfigError naming the text and what is wrong."""
    try:
        return _parse_uri(text) if "://" in text.partition("?")[0] else _parse_old(text)
    except ConfigError as error:
        raise ConfigError(f"image {text!r}: {error}") from None


def parse_port(text: str) -> int:
    """A TCP port, 1 to 65535."""
    if not _PORT.fullmatch(text) or not 0 < int(text) < 1 << 16:
        raise ConfigError(f"port {text!r}: give a number from 1 to 65535")
    return int(text)


def _parse_uri(text: str) -> NbdTarget:
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
    except ValueError as error:
        raise ConfigError(f"not a URI: {error}") from None
    if parts.scheme in _TLS_SCHEMES:
        raise ConfigError("TLS is not supported yet")
    if parts.username is not None or parts.fragment:
        raise ConfigError("an NBD URI has neither a user nor a fragment")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        if parts.netloc:
            raise ConfigError("a unix socket has no host: nbd+unix:///EXPORT?socket=PATH")
        if set(query) != {"socket"} or not query["socket"]:
            raise ConfigError("give the socket, and nothing else, behind the question mark: ?socket=PATH")
        return NbdTarget(export, socket=query["socket"])
    if query:
        raise ConfigError(f"{next(iter(query))!r} means nothing here")
    if not host:
        raise ConfigError("the host is missing: nbd://HOST[:PORT]/EXPORT")
    if ":" not in host:
        # a name or an IPv4 address, as written: urlsplit lowers it
        host = unquote(host)
    try:
        port = parts.port
    except ValueError:
        port = 0
    return NbdTarget(export, host, DEFAULT_PORT if port is None else parse_port(str(port)))


def _parse_old(text: str) -> NbdTarget:
    rest = text.partition(":")[2]
    rest, _, export = rest.partition(_OLD_EXPORT)
    if rest.startswith("unix:"):
        return NbdTarget(export, socket=rest.removeprefix("unix:"))
    host, _, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host:
        raise ConfigError("write nbd://HOST[:PORT]/EXPORT, or nbd+unix:///EXPORT?socket=PATH")
    return NbdTarget(export, host, parse_port(port))
