import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.server.addresses import TcpAddress, UnixAddress
from nbdserve.server.listeners import Listener, bind, bind_all, inherited

HAS_IPV6 = Path("/proc/net/if_inet6").exists() and "00000000000000000000000000000001" in Path(
    "/proc/net/if_inet6"
).read_text(encoding="ascii")


def accepts(listener: Listener, target: object) -> bool:
    with socket.socket(listener.sock.family) as client:
        client.connect(target)  # type: ignore[arg-type]
        accepted, _ = listener.sock.accept()
        accepted.close()
    return True


def test_tcp() -> None:
    (listener,) = bind(TcpAddress("127.0.0.1", 0))
    assert isinstance(listener.address, TcpAddress)
    assert listener.address.port > 0
    assert accepts(listener, ("127.0.0.1", listener.address.port))
    listener.close()


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
def test_ipv6_and_every_address() -> None:
    (listener,) = bind(TcpAddress("::1", 0))
    assert isinstance(listener.address, TcpAddress)
    assert accepts(listener, ("::1", listener.address.port))
    listener.close()
    listeners = bind(TcpAddress("*", 0))
    assert {listener.sock.family for listener in listeners} == {socket.AF_INET, socket.AF_INET6}
    assert len({listener.address for listener in listeners}) == 1
    for listener in listeners:
        listener.close()


def test_port_in_use_names_the_address_and_closes_the_others(tmp_path: Path) -> None:
    (first,) = bind(TcpAddress("127.0.0.1", 0))
    path = tmp_path / "s"
    with pytest.raises(ConfigError, match=f"cannot listen on {first.address}: the port is in use"):
        bind_all([UnixAddress(str(path)), first.address])
    assert not path.exists()
    first.close()


def test_unknown_host_and_address() -> None:
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid"):
        bind(TcpAddress("no-such-host.invalid", 0))
    with pytest.raises(ConfigError, match="does not have that address"):
        bind(TcpAddress("192.0.2.1", 0))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every port")
def test_privileged_port() -> None:
    with pytest.raises(ConfigError, match="permission denied"):
        bind(TcpAddress("127.0.0.1", 1))


def test_unix_socket_is_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (listener,) = bind(UnixAddress(str(path)))
    assert accepts(listener, str(path))
    listener.close()
    assert not path.exists()
    listener.close()


def test_abstract_socket() -> None:
    name = f"@nbdserve-test-{os.getpid()}"
    (listener,) = bind(UnixAddress(name))
    assert accepts(listener, "\0" + name[1:])
    with pytest.raises(ConfigError, match="another server listens there"):
        bind(UnixAddress(name))
    listener.close()


def test_dead_socket_is_replaced_and_a_live_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    (listener,) = bind(UnixAddress(str(path)))
    with pytest.raises(ConfigError, match="another server listens there"):
        bind(UnixAddress(str(path)))
    assert accepts(listener, str(path))
    listener.close()


def test_live_socket_with_a_full_backlog_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    clients = []
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen(0)
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            client.connect_ex(str(path))
            clients.append(client)
        with pytest.raises(ConfigError, match="another server listens there"):
            bind(UnixAddress(str(path)))
    for client in clients:
        client.close()


def test_other_file_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        bind(UnixAddress(str(path)))
    assert path.read_text() == "precious"


def test_socket_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (first,) = bind(UnixAddress(str(path)))
    # Kept under another name, so that the file system cannot give its inode to the second one.
    path.rename(tmp_path / "old")
    (second,) = bind(UnixAddress(str(path)))
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        bind(UnixAddress(str(tmp_path / "nowhere" / "s")))


def test_not_inherited_without_our_pid() -> None:
    environ = {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x"}
    assert inherited(environ) == []
    assert environ == {}
    assert inherited({}) == []


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_bad_count(count: str) -> None:
    with pytest.raises(ConfigError, match=f"LISTEN_FDS={count}"):
        inherited({"LISTEN_FDS": count, "LISTEN_PID": str(os.getpid())})


_CHILD = """
import os, sys
from nbdserve.errors import ConfigError
from nbdserve.server.listeners import inherited
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    print(*(listener.address for listener in inherited(os.environ)), sorted(k for k in os.environ if "LISTEN_" in k))
except ConfigError as error:
    print(error)
"""


def run_child(*fds: int) -> str:
    """The child's view of ``fds``, handed over as 3, 4, ..."""

    def place() -> None:
        for target, fd in enumerate([os.dup(os.dup2(fd, 40 + i)) for i, fd in enumerate(fds)], 3):
            os.dup2(fd, target, inheritable=True)

    environ = os.environ | {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join("n" for _ in fds)}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], env=environ, preexec_fn=place, close_fds=False, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_inherited(tmp_path: Path) -> None:
    (tcp,) = bind(TcpAddress("127.0.0.1", 0))
    (unix,) = bind(UnixAddress(str(tmp_path / "s")))
    assert run_child(tcp.sock.fileno(), unix.sock.fileno()) == f"{tcp.address} {unix.address} []"
    for listener in (tcp, unix):
        listener.close()


def test_inherited_but_not_listening() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert "no listening stream socket" in run_child(sock.fileno())
    with open(os.devnull) as file:
        assert "is no socket" in run_child(file.fileno())
