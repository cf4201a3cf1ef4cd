import asyncio
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from nbdserve.admin import server as admin_server
from nbdserve.admin.commands.table import COMMANDS
from nbdserve.admin.control import Control
from nbdserve.admin.events import STOP
from nbdserve.admin.server import AdminServer, bind_admin
from nbdserve.errors import ConfigError
from nbdserve.server.addresses import TcpAddress, UnixAddress
from tests.admin.broken_input import INPUTS, REQUESTS
from tests.admin.clients import RawClient, answers, needs_daemon, storage_daemon
from tests.admin.fuzz import campaign


def test_the_socket_is_its_owners(admin_socket: str) -> None:
    assert stat.S_IMODE(Path(admin_socket).stat().st_mode) == 0o600


@pytest.mark.parametrize("data", REQUESTS, ids=lambda data: data.decode()[:40])
def test_requests_with_a_mistake(client: RawClient, data: bytes) -> None:
    answer = client.ask(data)
    sent = eval(data.decode().replace("null", "None"))
    assert answer.get("id", "none") == sent.get("id", "none")
    assert answer["error"]["desc"] == REQUESTS[data] if REQUESTS[data] else "return" in answer


@needs_daemon
def test_qemu_answers_the_same(tmp_path: Path, admin_socket: str) -> None:
    with storage_daemon(tmp_path) as path:
        theirs, ours = RawClient(path), RawClient(admin_socket)
        assert ours.greeting["QMP"].keys() == theirs.greeting["QMP"].keys()
        early = [b'{"execute":"query-version","id":1}', b'{"execute":"x"}', b"[]", b'{"execute":"qmp_capabilities"}']
        for data in [*early, *INPUTS, *REQUESTS]:
            got, expected = answers(ours, data), answers(theirs, data)
            for answer in got + expected:
                if answer.get("return"):
                    answer["return"] = type(answer["return"])
            assert got == expected, data
        theirs.close()
        ours.close()


def test_a_long_line_and_half_a_line(admin_socket: str, client: RawClient) -> None:
    answer = client.ask(b'{"execute":"query-commands","id":"' + b"x" * 10_000_000 + b'"}')
    assert len(answer["id"]) == 10_000_000
    half = RawClient(admin_socket).negotiate()
    half.send(b'{"execute":"qu')
    half.close()
    shut = RawClient(admin_socket).negotiate()
    shut.send(b'{"execute":"qu')
    shut.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        shut.receive()
    shut.close()
    client.send(b'{"execute":"que')
    assert client.ask(b'ry-version"}')["return"]


@needs_daemon
def test_requests_with_random_changes_are_answered_as_by_qemu(tmp_path: Path, admin_socket: str) -> None:
    with storage_daemon(tmp_path) as path:
        assert list(campaign(admin_socket, path, int(os.environ.get("NBDSERVE_QMP_FUZZ", "300")), seed=7)) == []


def test_many_clients_at_once(admin_socket: str) -> None:
    clients = [RawClient(admin_socket) for _ in range(200)]
    for client in clients:
        client.negotiate()
    for number, client in enumerate(clients):
        client.send(b'{"execute":"query-version","id":%d}' % number)
    for number, client in enumerate(clients):
        assert client.receive()["id"] == number
        client.close()


def test_clients_have_their_own_conversations(admin_socket: str) -> None:
    clients = [RawClient(admin_socket) for _ in range(5)]
    clients[1].negotiate()
    assert "error" in clients[0].ask(b'{"execute":"query-version"}')
    assert "return" in clients[1].ask(b'{"execute":"query-version"}')
    for client in clients:
        client.close()


async def test_qemus_own_client_over_unix_and_tcp(control: Control, tmp_path: Path) -> None:
    listeners = bind_admin([UnixAddress(str(tmp_path / "s")), TcpAddress("127.0.0.1", 0)])
    server = AdminServer(control, COMMANDS)
    for listener in listeners:
        await server.listen(listener)
    tcp = listeners[1].address
    assert isinstance(tcp, TcpAddress)
    clients = [QMPClient("a"), QMPClient("b")]
    await clients[0].connect(str(tmp_path / "s"))
    await clients[1].connect((tcp.host, tcp.port))
    for client in clients:
        assert (await client.execute("query-version"))["qemu"]["major"] == 7
    control.events.emit(STOP)
    for client in clients:
        assert (await asyncio.wait_for(client.events.get(), 60))["event"] == "STOP"
        await client.disconnect()
    await server.close()
    for listener in listeners:
        listener.close()


async def test_the_end_is_told_to_those_who_listen(control: Control, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    (listener,) = bind_admin([UnixAddress(path)])
    server = AdminServer(control, COMMANDS)
    await server.listen(listener)
    client = await asyncio.to_thread(lambda: RawClient(path).negotiate())
    early = await asyncio.to_thread(RawClient, path)
    await server.close()
    assert (await asyncio.to_thread(client.receive))["event"] == "SHUTDOWN"
    for each in (client, early):
        with pytest.raises(EOFError):
            await asyncio.to_thread(each.receive)
        each.close()
    listener.close()


async def test_who_does_not_read_is_dropped(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(admin_server, "MAX_UNSENT", 10_000)
    path = str(tmp_path / "s")
    (listener,) = bind_admin([UnixAddress(path)])
    server = AdminServer(control, COMMANDS)
    await server.listen(listener)
    client = await asyncio.to_thread(lambda: RawClient(path).negotiate())
    for _ in range(20_000):
        control.events.emit(STOP)
    assert "does not read" in caplog.text
    await server.close()
    client.close()
    listener.close()


def test_the_log_knows_who_it_is(client: RawClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nbdserve.admin")
    client.ask(b'{"execute":"query-version"}')
    assert f"admin uid={os.getuid()} pid={os.getpid()}: query-version: done" in caplog.messages


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def test_addresses_that_are_refused(tmp_path: Path, taken: socket.socket) -> None:
    for host in ("*", "0.0.0.0", "192.0.2.1", "localhost"):
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1 and ::1 only"):
            bind_admin([TcpAddress(host, 0)])
    path = tmp_path / "s"
    with pytest.raises(ConfigError, match="in use"):
        bind_admin([UnixAddress(str(path)), TcpAddress("127.0.0.1", taken.getsockname()[1])])
    assert not path.exists()


def test_a_reply_is_one_line(client: RawClient) -> None:
    client.send(b'{"execute":"query-version","id":1} {"execute":"query-version","id":2}')
    assert [client.receive()["id"], client.receive()["id"]] == [1, 2]
    assert json.dumps(client.greeting)
