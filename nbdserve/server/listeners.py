"""Bound, listening sockets: made from addresses, or inherited by socket activation (sd_listen_fds(3)).

Binding is done before any image is opened, so that an address in use costs nothing. Nothing here accepts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.server.addresses import Address, TcpAddress, UnixAddress, address_of

BACKLOG: Final = 1024
"""Connections the kernel holds until they are accepted; it caps this at net.core.somaxconn."""

FIRST_INHERITED_FD: Final = 3
"""SD_LISTEN_FDS_START."""


@dataclass(slots=True)
class Listener:
    """A listening socket and its address. ``identity`` is the socket file's (device, inode), where there is one."""

    sock: socket.socket
    address: Address
    identity: tuple[int, int] | None = None

    def close(self) -> None:
        """Close the socket and remove its file, unless another server has put its own there. Idempotent."""
        self.sock.close()
        if self.identity is not None and isinstance(self.address, UnixAddress):
            path = Path(self.address.path)
            with contextlib.suppress(OSError):
                if _identity(path) == self.identity:
                    path.unlink()
            self.identity = None


def bind_all(addresses: Sequence[Address]) -> list[Listener]:
    """Listeners for every address; when one cannot be had, those already bound are closed and ConfigError says why."""
    listeners: list[Listener] = []
    try:
        for address in addresses:
            listeners += bind(address)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def bind(address: Address) -> list[Listener]:
    """Listen on ``address``: one socket, or several where a host name has several addresses.

    ConfigError names the address and what can be done about it.
    """
    if isinstance(address, UnixAddress):
        return [_bind_unix(address)]
    return _bind_tcp(address)


def inherited(environ: MutableMapping[str, str]) -> list[Listener]:
    """The sockets handed over in LISTEN_FDS when LISTEN_PID is this process; else none.

    The variables are removed from ``environ``, so that no child takes them for its own.
    """
    pid, count = environ.pop("LISTEN_PID", None), environ.pop("LISTEN_FDS", None)
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count is None:
        return []
    if not count.isdigit() or int(count) < 1:
        raise ConfigError(f"LISTEN_FDS={count}: give the number of sockets, 1 or more")
    listeners = []
    for fd in range(FIRST_INHERITED_FD, FIRST_INHERITED_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ConfigError(f"LISTEN_FDS={count}: file descriptor {fd} is no socket: {error.strerror}") from error
        if sock.type != socket.SOCK_STREAM or not listening:
            raise ConfigError(f"LISTEN_FDS={count}: file descriptor {fd} is no listening stream socket")
        sock.setblocking(False)
        listeners.append(Listener(sock, address_of(sock)))
    return listeners


# --- TCP ---------------------------------------------------------------------------------------------------------


def _bind_tcp(address: TcpAddress) -> list[Listener]:
    host = None if address.host == "*" else address.host
    try:
        found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot listen on {address}: {address.host!r} is not known: {reason}") from error
    listeners: list[Listener] = []
    unavailable: OSError | None = None
    port = address.port
    try:
        for family, _, _, _, sockaddr in dict.fromkeys(found):
            try:
                sock = _listening_tcp(family, (sockaddr[0], port, *sockaddr[2:]))
            except OSError as error:
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise ConfigError(_tcp_problem(TcpAddress(address.host, port), error)) from error
                unavailable = error
                continue
            # Port 0 is settled by the first socket: every address of one name has the same port.
            port = sock.getsockname()[1]
            listeners.append(Listener(sock, TcpAddress(address.host if host is None else str(sockaddr[0]), port)))
        if not listeners and unavailable is not None:
            raise ConfigError(_tcp_problem(address, unavailable)) from unavailable
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listening_tcp(family: int, sockaddr: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Without it a restart fails for the minute in which old connections are in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _tcp_problem(address: TcpAddress, error: OSError) -> str:
    problem = {
        errno.EADDRINUSE: "the port is in use; stop the server that has it, or choose another port",
        errno.EACCES: "permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE, choose one above",
        errno.EADDRNOTAVAIL: "this machine does not have that address",
        errno.EAFNOSUPPORT: "this machine does not have that address family",
    }.get(error.errno or 0, error.strerror)
    return f"cannot listen on {address}: {problem}"


# --- unix --------------------------------------------------------------------------------------------------------


def _bind_unix(address: UnixAddress) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not address.abstract:
            _remove_dead_socket(address)
        try:
            sock.bind(address.sockaddr())
        except OSError as error:
            raise ConfigError(_unix_problem(address, error)) from error
        identity = None if address.abstract else _identity(Path(address.path))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return Listener(sock, address, identity)


def _remove_dead_socket(address: UnixAddress) -> None:
    """Make way at the path: a socket nobody listens on any more is removed; anything else is refused."""
    path = Path(address.path)
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(_unix_problem(address, error)) from error
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(
            f"cannot listen on {address}: the path exists and is no socket; remove it or choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Non-blocking: a live server with a full backlog answers EAGAIN instead of holding the caller up.
        probe.setblocking(False)
        result = probe.connect_ex(address.path)
    if result not in {errno.ECONNREFUSED, errno.ENOENT}:
        raise ConfigError(_unix_problem(address, OSError(result or errno.EADDRINUSE, os.strerror(result))))
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: a dead server's socket cannot be removed: {error.strerror}"
        ) from error


def _unix_problem(address: UnixAddress, error: OSError) -> str:
    directory = Path(address.path).parent
    in_use = "another server listens there; stop it, or choose another path"
    problem = {
        errno.EADDRINUSE: in_use,
        errno.EAGAIN: in_use,
        errno.EACCES: f"permission denied; this user cannot create a socket in {directory}",
        errno.EPERM: f"permission denied; this user cannot create a socket in {directory}",
        errno.EROFS: f"{directory} is on a read-only file system",
        errno.ENOENT: f"the directory {directory} does not exist",
        errno.ENOTDIR: f"{directory} is no directory",
    }.get(error.errno or 0, error.strerror)
    return f"cannot listen on {address}: {problem}"


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
