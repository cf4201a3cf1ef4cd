from pathlib import Path
from typing import Any

import pytest

from tests.admin.clients import RawClient
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output, run, until

pytestmark = needs_images


def described(path: Path, name: str, driver: str = "qcow2", **more: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": driver, "node-name": name, "file": file} | {key.replace("_", "-"): more[key] for key in more}


def below(client: RawClient, name: str) -> str:
    """The name of the layer below a node."""
    found = next(node for node in nodes(client).values() if node["node-name"] == name)
    path = found["image"]["backing-image"]["filename"]
    return str(next(key for key, node in nodes(client).items() if node["file"] == path and node["drv"] != "file"))


def test_a_node_is_closed_to_writing_and_opened_again(client: RawClient, images: Path, tmp_path: Path) -> None:
    uri = f"nbd+unix:///o?socket={tmp_path}/nbd"
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    assert client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": f"{tmp_path}/nbd"}}) == {}
    assert client.execute("block-export-add", type="nbd", id="o", node_name="o") == {}
    assert "verification failed" not in output("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 64k", uri)
    read_only = described(images / "o.qcow2", "o", read_only=True, backing=below(client, "o"))
    assert client.execute("blockdev-reopen", options=[read_only]) == {}
    assert nodes(client)["o"]["ro"] is True
    output("qemu-img", "check", images / "o.qcow2")  # which locks it, as one who reads it
    assert client.execute("blockdev-reopen", options=[read_only | {"read-only": False, "discard": "unmap"}]) == {}
    assert nodes(client)["o"]["ro"] is False
    assert "verification failed" not in output("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 64k", uri)
    assert client.execute("block-export-del", id="o") == {}
    assert client.execute("block-export-add", type="nbd", id="o", node_name="o", writable=True) == {}
    output("qemu-io", "-f", "raw", "-c", "write -P 97 0 64k", uri)
    refused = client.execute("blockdev-reopen", options=[read_only])
    assert refused == "Read-only block node 'o' cannot support read-write users"


def test_all_of_them_or_none(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    assert add(client, "raw", images / "b.raw", "r") == {}
    both = [
        described(images / "o.qcow2", "o", read_only=True, detect_zeroes="on", backing=None),
        described(images / "a.qcow2", "r", "raw", read_only=True),
    ]
    assert client.execute("blockdev-reopen", options=both) == "Cannot change the option 'filename'"
    assert [nodes(client)[name]["ro"] for name in "or"] == [False, False]
    assert nodes(client)["o"]["detect_zeroes"] == "off"
    assert nodes(client)["o"]["image"]["backing-image"]["filename"] == str(images / "a.qcow2")
    assert run("qemu-io", "-c", "write 0 64k", images / "o.qcow2").returncode != 0, "it is locked as before"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"driver": "raw"}, "Cannot change the option 'driver'"),
        ({}, "backing is missing for 'o'"),
        ({"backing": "r"}, "Node 'r' is open for writing"),
        ({"file": "nowhere"}, "Cannot find device='' nor node-name='nowhere'"),
    ],
)
def test_what_stays_as_it_is(client: RawClient, images: Path, more: dict[str, Any], problem: str) -> None:
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    assert add(client, "raw", images / "b.raw", "r") == {}
    given = described(images / "o.qcow2", "o") | more
    assert client.execute("blockdev-reopen", options=[given]).startswith(problem)


def test_drivers_that_have_no_file(client: RawClient) -> None:
    assert client.execute("blockdev-add", driver="null-co", node_name="n") == {}
    refused = client.execute("blockdev-reopen", options=[{"driver": "null-co", "node-name": "n"}])
    assert refused == "'n': nodes of the driver 'null-co' cannot be opened again"


def test_another_node_below(client: RawClient, images: Path, tmp_path: Path) -> None:
    uri = f"nbd+unix:///o?socket={tmp_path}/nbd"
    output("qemu-io", "-f", "raw", "-c", "write -P 98 0 1M", images / "b.raw")
    output("qemu-io", "-f", "qcow2", "-c", "write -P 97 0 1M", images / "a.qcow2")
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    assert add(client, "raw", images / "b.raw", "b", read_only=True) == {}
    old = below(client, "o")
    assert client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": f"{tmp_path}/nbd"}}) == {}
    assert client.execute("block-export-add", type="nbd", id="o", node_name="o", writable=True) == {}

    def seen(*letters: int) -> bool:
        commands = [part for at, letter in enumerate(letters) for part in ("-c", f"read -P {letter} {at * 64}k 64k")]
        return "verification failed" not in output("qemu-io", "-r", "-f", "raw", *commands, uri)

    assert seen(97, 97)
    output("qemu-io", "-f", "raw", "-c", "write -P 111 0 64k", uri)
    over_b = described(images / "o.qcow2", "o", backing="b")
    assert client.execute("blockdev-reopen", options=[over_b]) == {}
    assert seen(111, 98)
    assert nodes(client)["o"]["image"]["backing-image"]["filename"] == str(images / "b.raw")
    assert old not in nodes(client)
    assert client.execute("blockdev-reopen", options=[over_b]) == {}, "as it is"
    assert client.execute("blockdev-del", node_name="b") == "Node 'b' is busy: node is used as backing hd of 'o'"
    written = described(images / "b.raw", "b", "raw")
    refused = client.execute("blockdev-reopen", options=[written])
    assert refused == "Node 'b' is used as a backing file: it stays read-only"
    alone = described(images / "o.qcow2", "o", backing=None)
    both = [alone, described(images / "a.qcow2", "b", "raw", read_only=True)]
    assert client.execute("blockdev-reopen", options=both) == "Cannot change the option 'filename'"
    assert seen(111, 98), "all of them or none"
    assert client.execute("blockdev-reopen", options=[alone]) == {}
    assert client.execute("blockdev-reopen", options=[written]) == {}
    assert seen(111, 0)
    output("qemu-io", "-f", "raw", "-c", "write -P 112 70k 2k", uri)
    assert client.execute("blockdev-del", node_name="b") == {}
    output("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", images / "b.raw")  # nobody has it open
    assert client.execute("block-export-del", id="o") == {}
    assert client.execute("blockdev-del", node_name="o") == {}
    commands = ["-c", "read -P 111 0 64k", "-c", "read -P 97 128k 64k"]
    assert "failed" not in output("qemu-io", "-f", "qcow2", *commands, images / "o.qcow2"), "the header stays"


def test_a_job_takes_the_node_below_away(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    assert add(client, "raw", images / "b.raw", "b", read_only=True) == {}
    assert client.execute("blockdev-reopen", options=[described(images / "o.qcow2", "o", backing="b")]) == {}
    assert client.execute("block-stream", job_id="s", device="o") == {}
    until(lambda: not client.execute("query-jobs"), "the job is over")
    assert client.execute("blockdev-del", node_name="b") == {}
    assert client.execute("blockdev-del", node_name="o") == {}


def test_the_cache(client: RawClient, images: Path) -> None:
    assert add(client, "raw", images / "b.raw", "b") == {}
    for no_flush in (True, False):
        given = described(images / "b.raw", "b", "raw", cache={"no-flush": no_flush})
        assert client.execute("blockdev-reopen", options=[given]) == {}
        assert nodes(client)["b"]["cache"]["no-flush"] is no_flush
    given = described(images / "b.raw", "b", "raw", cache={"direct": True})
    if client.execute("blockdev-reopen", options=[given]) == {}:  # the file system has direct I/O
        assert nodes(client)["b"]["cache"]["direct"] is True
    else:
        assert nodes(client)["b"]["cache"]["direct"] is False


def test_a_backing_file_that_is_refused_changes_nothing(client: RawClient, images: Path) -> None:
    for name, more in (("a", []), ("b", []), ("o", ["-b", "a.vmdk", "-F", "vmdk"])):
        output("qemu-img", "create", "-q", "-f", "vmdk", *more, images / f"{name}.vmdk", *([] if more else ["1M"]))
    assert add(client, "vmdk", images / "o.vmdk", "o") == {}
    assert add(client, "vmdk", images / "b.vmdk", "b", read_only=True) == {}
    old = below(client, "o")
    given = described(images / "o.vmdk", "o", "vmdk", read_only=True, backing="b")
    assert "parentCID" in client.execute("blockdev-reopen", options=[given])
    assert nodes(client)["o"]["ro"] is False
    assert below(client, "o") == old
    assert client.execute("blockdev-del", node_name="b") == {}
    output("qemu-io", "-f", "vmdk", "-c", "write 0 512", images / "b.vmdk")  # nobody has it open


def test_an_image_on_a_file_that_is_a_node(client: RawClient, images: Path) -> None:
    for name, read_only in (("w", False), ("r", True)):
        file = str(images / ("a.qcow2" if name == "w" else "b.raw"))
        assert client.execute("blockdev-add", driver="file", node_name=name, filename=file, read_only=read_only) == {}
    assert client.execute("blockdev-add", driver="qcow2", node_name="q", file="w", read_only=True) == {}
    assert client.execute("blockdev-add", driver="raw", node_name="b", file="r", read_only=True) == {}
    for read_only in (False, True, False):
        given = {"driver": "qcow2", "node-name": "q", "file": "w", "read-only": read_only}
        assert client.execute("blockdev-reopen", options=[given]) == {}
        assert nodes(client)["q"]["ro"] is read_only
    assert run("qemu-io", "-r", "-c", "read 0 64k", images / "a.qcow2").returncode != 0, "it is locked"
    refused = client.execute("blockdev-reopen", options=[{"driver": "raw", "node-name": "b", "file": "r"}])
    assert refused.endswith("cannot be opened for writing: the node of its file is read-only")
    assert [client.execute("blockdev-del", node_name=name) for name in "qbwr"] == [{}] * 4
    output("qemu-io", "-c", "write 0 64k", images / "a.qcow2")
