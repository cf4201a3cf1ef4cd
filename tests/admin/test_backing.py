"""Chains described node by node, as management software describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbdserve.admin.control import Control
from nbdserve.admin.nodes import NodeEntry
from tests.admin.clients import RawClient
from tests.admin.commands.test_jobs import wait_for
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


def letters(image: Path | str, *wanted: int, driver: str = "qcow2") -> bool:
    """Whether the first places of 64 KiB hold these letters; 0: zeroes."""
    commands = [part for at, letter in enumerate(wanted) for part in ("-c", f"read -P {letter} {at * 64}k 64k")]
    return "failed" not in output("qemu-io", "-r", "-f", driver, *commands, image)


def write(image: Path | str, letter: int, at: int, driver: str = "qcow2") -> None:
    output("qemu-io", "-f", driver, "-c", f"write -P {letter} {at * 64}k 64k", image)


@pytest.fixture
def chain(client: RawClient, images: Path) -> Path:
    """``t`` over ``o`` over ``a``: the names of nodes, each added by itself, and the letters they hold at 0, 1, 2."""
    output("qemu-img", "create", "-q", "-f", "qcow2", "-b", "o.qcow2", "-F", "qcow2", images / "t.qcow2")
    for at, name in enumerate("aot"):
        write(images / f"{name}.qcow2", ord(name), at)
    assert add(client, "qcow2", images / "a.qcow2", "a", read_only=True) == {}
    assert add(client, "qcow2", images / "o.qcow2", "o", read_only=True, backing="a") == {}
    assert add(client, "qcow2", images / "t.qcow2", "t", backing="o") == {}
    return images


def export(client: RawClient, tmp_path: Path, name: str) -> str:
    """The URI of a new export of the node that may be written."""
    address = {"type": "unix", "data": {"path": f"{tmp_path}/nbd"}}
    assert client.execute("nbd-server-start", addr=address) == {}
    assert client.execute("block-export-add", type="nbd", id=name, node_name=name, writable=True) == {}
    return f"nbd+unix:///{name}?socket={tmp_path}/nbd"


def finish(client: RawClient, identity: str) -> Any:
    """The error of a job, when it is over."""
    job = wait_for(client, identity, "concluded")
    assert client.execute("job-dismiss", id=identity) == {}
    return job.get("error")


def test_nodes_stay_while_others_stand_on_them(client: RawClient, chain: Path, tmp_path: Path) -> None:
    uri = export(client, tmp_path, "t")
    assert letters(uri, 97, 111, 116, driver="raw")
    write(uri, 120, 0, driver="raw")
    assert nodes(client)["t"]["backing_file_depth"] == 2
    busy = [client.execute("blockdev-del", node_name=name) for name in "ao"]
    assert busy == [f"Node '{name}' is busy: node is used as backing hd of '{up}'" for name, up in ("ao", "ot")]
    assert add(client, "qcow2", chain / "t.qcow2", "x", backing="a") != {}, "it is locked"
    assert client.execute("block-export-del", id="t") == {}
    for name in "toa":
        assert client.execute("blockdev-del", node_name=name) == {}
    assert letters(chain / "t.qcow2", 120, 111, 116)
    assert letters(chain / "a.qcow2", 97, 0, 0)
    write(chain / "a.qcow2", 1, 0)  # nobody has it open


def test_two_stand_on_one(client: RawClient, chain: Path) -> None:
    output("qemu-img", "create", "-q", "-f", "qcow2", "-b", "o.qcow2", "-F", "qcow2", chain / "u.qcow2")
    assert add(client, "qcow2", chain / "u.qcow2", "u", backing="o") == {}
    assert (
        client.execute("block-commit", device="u", job_id="c")
        == "Node 'o' is in use by node 't', and cannot be written"
    )
    assert client.execute("blockdev-del", node_name="t") == {}
    assert client.execute("blockdev-del", node_name="o") == "Node 'o' is busy: node is used as backing hd of 'u'"
    assert client.execute("blockdev-del", node_name="u") == {}
    assert client.execute("blockdev-del", node_name="o") == {}


def test_commit_between_nodes(client: RawClient, chain: Path, tmp_path: Path) -> None:
    uri = export(client, tmp_path, "t")
    asked: dict[str, Any] = {"device": "t", "job_id": "c", "top_node": "o", "base_node": "a", "auto_dismiss": False}
    assert client.execute("block-commit", **asked) == {}
    assert finish(client, "c") is None
    assert letters(uri, 97, 111, 116, driver="raw")
    assert nodes(client)["t"]["image"]["backing-image"]["filename"] == str(chain / "a.qcow2")
    assert "o" not in nodes(client)
    assert client.execute("block-commit", device="t", job_id="d", base_node="a", auto_dismiss=False) == {}
    wait_for(client, "d", "ready")
    write(uri, 120, 3, driver="raw")
    assert client.execute("job-complete", id="d") == {}
    assert finish(client, "d") is None
    assert nodes(client)["t"]["file"] == str(chain / "a.qcow2")
    assert letters(uri, 97, 111, 116, 120, driver="raw")
    assert client.execute("block-export-del", id="t") == {}
    assert client.execute("blockdev-del", node_name="t") == {}
    assert letters(chain / "a.qcow2", 97, 111, 116, 120)
    assert "No errors" in output("qemu-img", "check", chain / "a.qcow2")


def test_a_commit_into_the_middle_leaves_what_is_below(client: RawClient, chain: Path) -> None:
    assert client.execute("block-commit", device="t", job_id="c", base_node="o", auto_dismiss=False) == {}
    wait_for(client, "c", "ready")
    assert client.execute("block-job-cancel", device="c") == {}
    assert finish(client, "c") is None
    assert client.execute("blockdev-del", node_name="a") == "Node 'a' is busy: node is used as backing hd of 't'"
    assert client.execute("blockdev-del", node_name="t") == {}
    assert client.execute("blockdev-del", node_name="a") == {}
    assert letters(chain / "o.qcow2", 97, 111, 116)


def test_stream_from_a_node(client: RawClient, chain: Path) -> None:
    assert client.execute("block-stream", device="t", job_id="s", base_node="a", auto_dismiss=False) == {}
    assert finish(client, "s") is None
    assert client.execute("blockdev-del", node_name="o") == {}
    assert client.execute("blockdev-del", node_name="t") == {}
    assert client.execute("blockdev-del", node_name="a") == {}
    (chain / "o.qcow2").unlink()
    assert letters(chain / "t.qcow2", 97, 111, 116)


def test_the_name_of_a_backing_file_in_a_node_below(client: RawClient, chain: Path) -> None:
    absolute = str(chain / "a.qcow2")
    asked = {"device": "t", "image_node_name": "o", "backing_file": absolute}
    assert client.execute("change-backing-file", **asked) == {}
    assert client.execute("blockdev-del", node_name="t") == {}
    assert f"backing file: {absolute}" in output("qemu-img", "info", chain / "o.qcow2")


def test_files_and_images_are_nodes_of_their_own(client: RawClient, images: Path) -> None:
    write(images / "o.qcow2", 111, 1)
    for name in "ao":
        arguments: dict[str, Any] = {"node_name": f"{name}-file", "filename": str(images / f"{name}.qcow2")}
        assert client.execute("blockdev-add", driver="file", auto_read_only=True, **arguments) == {}
    assert client.execute("blockdev-add", driver="qcow2", node_name="a", file="a-file", read_only=True) == {}
    assert client.execute("blockdev-add", driver="qcow2", node_name="o", file="o-file", backing="a") == {}
    assert client.execute("blockdev-del", node_name="a-file") == "Block device a-file is in use"
    assert client.execute("block-commit", device="o", job_id="c", base_node="a", auto_dismiss=False) == {}
    wait_for(client, "c", "ready")
    assert client.execute("job-complete", id="c") == {}
    assert finish(client, "c") is None
    for name in ("o", "a-file", "o-file"):
        assert client.execute("blockdev-del", node_name=name) == {}
    assert letters(images / "a.qcow2", 0, 111)


def test_what_is_no_backing_file(client: RawClient, images: Path) -> None:
    assert add(client, "raw", images / "b.raw", "b") == {}
    assert add(client, "qcow2", images / "o.qcow2", "o", backing="b").endswith(
        "open it read-only, for it to be a backing file"
    )
    assert add(client, "raw", images / "b.raw", "r", backing="b") == "Parameter 'backing' is unexpected"
    assert client.execute("blockdev-del", node_name="b") == {}
    write(images / "o.qcow2", 1, 0)  # nobody has it open


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("block-commit", {"job_id": "c", "base_node": "o"}),
        ("change-backing-file", {"image_node_name": "o", "backing_file": "a.qcow2"}),
    ],
)
def test_a_chain_that_changes_while_a_node_is_taken_in(
    client: RawClient,
    chain: Path,
    control: Control,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: dict[str, Any],
) -> None:
    absorb = control.nodes.absorb_below

    async def absorb_and_lose(entry: NodeEntry, below: NodeEntry) -> None:
        await absorb(entry, below)
        async with entry.node.drained():
            lost = entry.node.layers[-1]
            entry.node.replace_layers(entry.node.layers[:-1])
        await lost.close()

    monkeypatch.setattr(control.nodes, "absorb_below", absorb_and_lose)
    refused = client.execute(command, device="t", **arguments)
    assert refused == "Node 't' has got other layers meanwhile: try again"
    assert client.execute("query-jobs") == []
