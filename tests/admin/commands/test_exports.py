import asyncio
import errno
import os
import select
import socket
from pathlib import Path

import pytest

from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.block.forms import READ_WAIT
from nbdserve.block.node import Node
from nbdserve.cli.nbd_client import Client, list_exports
from nbdserve.errors import ProtocolError, RequestError
from nbdserve.exports.export import Export
from nbdserve.formats.raw import RawDriver
from nbdserve.server.addresses import UnixAddress
from nbdserve.storage.memory import MemoryStorage
from tests.admin.clients import RawClient
from tests.admin.images import needs_images

pytestmark = needs_images


def test_exports_come_and_go_under_their_clients(client: RawClient, images: Path, tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "nbd"))
    unix = {"type": "unix", "data": {"path": address.path}}
    file = {"driver": "file", "filename": str(images / "b.raw")}
    assert client.execute("nbd-server-start", addr=unix) == {}
    assert client.execute("blockdev-add", driver="raw", node_name="r", file=file) == {}
    assert client.execute("block-export-add", type="nbd", id="e", node_name="r", writable=True) == {}
    assert client.execute("block-export-add", type="nbd", id="o", node_name="r", name="other") == {}
    assert sorted(list_exports(address)) == [("other", ""), ("r", "")]
    user = Client(address, "r")
    assert user.read(0, 5) == bytes(5)
    assert client.execute("block-export-del", id="e") == "export 'e' still in use"
    assert client.execute("blockdev-del", node_name="r") == "Node r is in use"
    client.send(b'{"execute":"block-export-del","arguments":{"id":"e","mode":"hard"}}')
    event, reply = client.receive(), client.receive()
    assert (event["event"], event["data"]) == ("BLOCK_EXPORT_DELETED", {"id": "e"})
    assert reply == {"return": {}}
    with pytest.raises((OSError, ProtocolError)):
        user.read(0, 1)
    user.close()
    assert list_exports(address) == (("other", ""),)
    assert client.execute("nbd-server-stop") == {}
    assert client.execute("query-block-exports") == []
    assert not Path(address.path).exists()
    assert client.execute("nbd-server-start", addr=unix) == {}
    assert client.execute("nbd-server-stop") == {}
    assert client.execute("blockdev-del", node_name="r") == {}


def test_an_export_of_another_server_is_a_node(client: RawClient, images: Path, tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "nbd"))
    client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": address.path}})
    file = {"driver": "file", "filename": str(images / "a.qcow2")}
    assert client.execute("blockdev-add", driver="raw", node_name="r", file=file) == {}
    assert client.execute("block-export-add", type="nbd", id="r", node_name="r", writable=True) == {}
    server = {"type": "unix", "path": address.path}
    nbd = {"driver": "nbd", "server": server, "export": "r"}
    assert client.execute("blockdev-add", driver="qcow2", node_name="q", file=nbd) == {}
    (info,) = [info for info in client.execute("query-named-block-nodes") if info["node-name"] == "q"]
    assert info["image"]["virtual-size"] == 1 << 20
    assert "nbd+unix" in info["file"]
    problem = client.execute("blockdev-add", driver="nbd", node_name="n", server=server, export="absent")
    assert "absent" in problem
    assert client.execute("blockdev-del", node_name="q") == {}
    client.execute("block-export-del", id="r", mode="hard")


def exported(client: RawClient, images: Path, tmp_path: Path) -> UnixAddress:
    """``b.raw`` as ``r``, with the ids e and o."""
    address = UnixAddress(str(tmp_path / "nbd"))
    client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": address.path}})
    file = {"driver": "file", "filename": str(images / "b.raw")}
    assert client.execute("blockdev-add", driver="raw", node_name="r", file=file) == {}
    assert client.execute("block-export-add", type="nbd", id="e", node_name="r", writable=True) == {}
    assert client.execute("block-export-add", type="nbd", id="o", node_name="r", name="other") == {}
    return address


def test_an_export_that_is_hidden_is_there_for_its_clients(client: RawClient, images: Path, tmp_path: Path) -> None:
    address = exported(client, images, tmp_path)
    user = Client(address, "r")
    assert client.execute("block-export-del", id="e", mode="hide") == {}
    assert list_exports(address) == (("other", ""),)
    assert user.read(0, 5) == bytes(5)
    assert [export["shutting-down"] for export in client.execute("query-block-exports")] == [False, True]
    assert client.execute("block-export-del", id="e", mode="hide") == "Export 'e' is already shutting down"
    assert client.execute("block-export-add", type="nbd", id="e2", node_name="r") == {}, "the name is free"
    user.close()
    while "event" not in (event := client.receive()):
        pass
    assert (event["event"], event["data"]) == ("BLOCK_EXPORT_DELETED", {"id": "e"})
    assert client.execute("block-export-del", id="o", mode="hide") == {}
    assert [export["id"] for export in client.execute("query-block-exports")] == ["e2"]


def test_clients_of_an_export_that_is_removed_softly_are_told(client: RawClient, images: Path, tmp_path: Path) -> None:
    address = exported(client, images, tmp_path)
    user = Client(address, "r")
    assert client.execute("block-export-del", id="e", mode="hide") == {}
    assert client.execute("block-export-del", id="e", mode="soft") == {}
    with pytest.raises((OSError, ProtocolError)):
        user.read(0, 1)
    user.close()
    assert client.receive()["data"] == {"id": "e"}


def test_exports_in_a_transaction(client: RawClient, images: Path, tmp_path: Path) -> None:
    address = exported(client, images, tmp_path)
    add, remove = "__org.nbdserve_block-export-add", "__org.nbdserve_block-export-del"
    actions = [
        {"type": remove, "data": {"id": "e"}},
        {"type": add, "data": {"type": "nbd", "id": "n", "node-name": "r"}},
        {"type": "block-dirty-bitmap-add", "data": {"node": "r", "name": "b"}},
    ]
    abort = {"type": "abort", "data": {}}
    assert client.execute("transaction", actions=[*actions, abort]).startswith("Transaction aborted")
    assert [export["id"] for export in client.execute("query-block-exports")] == ["o", "e"]
    assert sorted(list_exports(address)) == [("other", ""), ("r", "")]
    twice = client.execute("transaction", actions=[actions[0], actions[0]])
    assert twice == "Export 'e' is already shutting down"
    assert client.execute("transaction", actions=actions) == {}
    assert [export["id"] for export in client.execute("query-block-exports")] == ["n", "o"]
    assert sorted(list_exports(address)) == [("other", ""), ("r", "")]


def test_a_request_that_fails_is_told(
    client: RawClient, control: Control, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = exported(client, images, tmp_path)
    node = control.nodes.get("r").node

    async def fail(*given: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(node, "read_pieces", fail)
    monkeypatch.setattr(node, "try_read_into", lambda offset, buffer: READ_WAIT)
    user = Client(address, "r")
    with pytest.raises((OSError, RequestError, ProtocolError)):
        user.read(0, 512)
    event = client.receive()
    assert event["event"] == "BLOCK_IO_ERROR"
    assert event["data"] == {
        "device": "",
        "node-name": "r",
        "operation": "read",
        "action": "report",
        "nospace": False,
        "reason": "Input/output error",
    }
    user.close()


def test_what_is_refused(client: RawClient, images: Path, tmp_path: Path) -> None:
    unix = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    assert client.execute("nbd-server-start", addr=unix, tls_creds="t") == "No TLS credentials with id 't'"
    absent = {"type": "unix", "data": {"path": str(tmp_path / "absent" / "nbd")}}
    refused = client.execute("nbd-server-start", addr=absent)
    assert refused == f"Failed to bind socket to {absent['data']['path']}: No such file or directory"
    inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    assert client.execute("nbd-server-start", addr=inet) == {}
    file = {"driver": "file", "filename": str(images / "b.raw")}
    assert client.execute("blockdev-add", driver="raw", node_name="r", read_only=True, file=file) == {}
    refused = client.execute("block-export-add", type="nbd", id="e", node_name="r", writable=True)
    assert refused == "Block node is read-only: 'r' cannot be exported writable"
    assert client.execute("nbd-server-add", device="r", writable=True) == {}
    assert "4096 bytes" in client.execute("block-export-add", type="nbd", id="e", node_name="r", name="x" * 5000)
    assert client.execute("nbd-server-remove", name="r") == {}


async def test_commands_do_not_end_what_the_server_was_started_with(control: Control) -> None:

    node = Node([await RawDriver.open(MemoryStorage(bytes(512), path="/m/disk 1.raw"), {}, read_only=False)])
    export = Export("a/b c", node)
    control.server.exports.add(export)
    control.adopt([(export, "none")], [], listening=True)
    (entry,) = control.devices()
    assert (entry.name, entry.cache, entry.users) == ("a-b-c", "none", ["export 'a/b c'"])
    with pytest.raises(Exception, match="not owned by the monitor"):
        control.nodes.remove(entry.name)
    with pytest.raises(Exception, match="NBD server not running"):
        control.exports.stop_server()
    await control.quiesce()
    await control.quiesce()
    read = asyncio.ensure_future(asyncio.create_task(node.read(0, 1)))
    await asyncio.sleep(0)
    await control.begin_end()
    await read
    await control.close()
    assert await node.read(0, 1) == b"\0"


def test_so_many_clients_at_a_time(client: RawClient, tmp_path: Path) -> None:
    path = tmp_path / "nbd"
    address = {"type": "unix", "data": {"path": str(path)}}
    assert client.execute("nbd-server-start", addr=address, max_connections=1) == {}
    first, second = (socket.socket(socket.AF_UNIX) for _ in range(2))
    for sock in (first, second):
        sock.settimeout(60)
        sock.connect(str(path))
        if sock is first:
            assert sock.recv(8) == b"NBDMAGIC"
    assert select.select([second], [], [], 0.1) == ([], [], []), "it waits in the backlog"
    first.close()
    assert second.recv(8) == b"NBDMAGIC"
    second.close()
    assert client.execute("nbd-server-stop") == {}


def test_sockets_are_below_the_roots(client: RawClient, control: Control, images: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (tmp_path / "link").symlink_to(outside)
    for path in (outside / "s", tmp_path / "link" / "s"):
        refused = client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        assert refused == (
            f"Failed to bind socket to {path}: it is outside the roots for secrets and sockets; "
            "add its directory to roots of [admin]"
        )
    assert list(outside.iterdir()) == []
    control.private_paths.add(outside)
    for path in (outside / "s", tmp_path / "link" / "s", images / "s"):
        assert client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}}) == {}
        assert path.is_socket()
        assert client.execute("nbd-server-stop") == {}
        assert not path.exists()
    assert client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": f"@{tmp_path}"}}) == {}


async def test_a_directory_that_is_moved_while_a_socket_is_made(control: Control, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    directory = os.open(tmp_path / "other", os.O_PATH)
    with pytest.raises(QmpError, match="its directory was moved meanwhile"):
        await control.exports.start_server(UnixAddress(str(tmp_path / "s")), 0, directory)
    os.close(directory)
    assert not (tmp_path / "s").exists()
