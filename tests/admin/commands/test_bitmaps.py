from pathlib import Path
from typing import Any

from tests.admin.clients import RawClient
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


def bitmaps(client: RawClient, node: str) -> dict[str, Any]:
    return {each["name"]: each for each in nodes(client)[node].get("dirty-bitmaps", [])}


def test_what_clients_change_is_dirty(client: RawClient, images: Path, tmp_path: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    assert client.execute("block-dirty-bitmap-add", node="q", name="b", persistent=True) == {}
    assert client.execute("block-dirty-bitmap-add", node="q", name="off", disabled=True, granularity=4096) == {}
    unix = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    assert client.execute("nbd-server-start", addr=unix) == {}
    assert client.execute("block-export-add", type="nbd", id="e", node_name="q", writable=True, bitmaps=["b"]) == {}
    uri = f"nbd+unix:///q?socket={tmp_path}/nbd"
    output("qemu-io", "-f", "raw", "-c", "write 128k 1k", uri)
    found = bitmaps(client, "q")
    assert (found["b"]["count"], found["b"]["recording"], found["b"]["persistent"]) == (65536, True, True)
    assert (found["off"]["count"], found["off"]["recording"], found["off"]["granularity"]) == (0, False, 4096)
    assert '"offset": 131072' in output("nbdinfo", "--map=qemu:dirty-bitmap:b", "--json", uri)
    assert (
        client.execute("block-dirty-bitmap-merge", node="q", target="off", bitmaps=[{"node": "q", "name": "b"}]) == {}
    )
    assert bitmaps(client, "q")["off"]["count"] == 65536
    assert client.execute("block-dirty-bitmap-clear", node="q", name="b") == {}
    assert client.execute("block-dirty-bitmap-disable", node="q", name="b") == {}
    output("qemu-io", "-f", "raw", "-c", "write 0 1k", uri)
    assert bitmaps(client, "q")["b"]["count"] == 0
    missing = client.execute("block-export-add", type="nbd", id="f", node_name="q", name="f", bitmaps=["zz"])
    assert missing == "Bitmap 'zz' is not found"
    client.execute("nbd-server-stop")


def test_a_transaction_changes_all_or_nothing(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    assert client.execute("block-dirty-bitmap-add", node="q", name="b") == {}

    def action(kind: str, **data: Any) -> dict[str, Any]:
        return {"type": f"block-dirty-bitmap-{kind}", "data": {"node": "q"} | data}

    actions = [
        action("add", name="new"),
        action("disable", name="b"),
        action("clear", name="b"),
        action("merge", target="new", bitmaps=["b"]),
        action("enable", name="new"),
        action("remove", name="b"),
    ]
    before = bitmaps(client, "q")
    failed = client.execute("transaction", actions=[*actions, {"type": "abort", "data": {}}])
    assert failed == "Transaction aborted using Abort action"
    assert bitmaps(client, "q") == before
    busy = client.execute("transaction", actions=[actions[5], actions[2]])
    assert "in use by another operation" in busy
    assert bitmaps(client, "q") == before
    assert client.execute("transaction", actions=actions) == {}
    assert list(bitmaps(client, "q")) == ["new"]
