from pathlib import Path
from typing import Any

import pytest

from tests.admin.clients import RawClient
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output, run

pytestmark = needs_images


def described(path: Path, name: str, driver: str = "qcow2", **more: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": driver, "node-name": name, "file": file} | {key.replace("_", "-"): more[key] for key in more}


def test_a_node_is_closed_to_writing_and_opened_again(client: RawClient, images: Path, tmp_path: Path) -> None:
    uri = f"nbd+unix:///o?socket={tmp_path}/nbd"
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    assert client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": f"{tmp_path}/nbd"}}) == {}
    assert client.execute("block-export-add", type="nbd", id="o", node_name="o") == {}
    assert "verification failed" not in output("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 64k", uri)
    read_only = described(images / "o.qcow2", "o", read_only=True)
    assert client.execute("blockdev-reopen", options=[read_only]) == {}
    assert nodes(client)["o"]["ro"] is True
    output("qemu-img", "check", images / "o.qcow2")  # which locks it, as one who reads it
    assert client.execute("blockdev-reopen", options=[described(images / "o.qcow2", "o", discard="unmap")]) == {}
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
        described(images / "o.qcow2", "o", read_only=True, detect_zeroes="on"),
        described(images / "a.qcow2", "r", "raw", read_only=True),
    ]
    assert client.execute("blockdev-reopen", options=both) == "Cannot change the option 'filename'"
    assert [nodes(client)[name]["ro"] for name in "or"] == [False, False]
    assert nodes(client)["o"]["detect_zeroes"] == "off"
    assert run("qemu-io", "-c", "write 0 64k", images / "o.qcow2").returncode != 0, "it is locked as before"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"driver": "raw"}, "Cannot change the option 'driver'"),
        ({"cache": {"direct": True}}, "Cannot change the option 'cache'"),
        ({"backing": None}, "'backing': block-stream"),
        ({"file": "nowhere"}, "Cannot find device='' nor node-name='nowhere'"),
    ],
)
def test_what_stays_as_it_is(client: RawClient, images: Path, more: dict[str, Any], problem: str) -> None:
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    given = described(images / "o.qcow2", "o") | more
    assert client.execute("blockdev-reopen", options=[given]).startswith(problem)


def test_drivers_that_have_no_file(client: RawClient) -> None:
    assert client.execute("blockdev-add", driver="null-co", node_name="n") == {}
    refused = client.execute("blockdev-reopen", options=[{"driver": "null-co", "node-name": "n"}])
    assert refused == "'n': nodes of the driver 'null-co' cannot be opened again"
