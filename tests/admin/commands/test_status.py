from pathlib import Path

from tests.admin.clients import RawClient
from tests.admin.commands.test_nodes import add
from tests.admin.images import needs_images
from tests.cli.processes import started, until


@needs_images
def test_what_the_server_does(client: RawClient, images: Path, tmp_path: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    unix = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    assert client.execute("nbd-server-start", addr=unix) == {}
    assert client.execute("block-export-add", type="nbd", id="e", node_name="q", name="disk", writable=True) == {}
    before = client.execute("__org.nbdserve_status")
    assert before["clients"] == []
    uri = f"nbd+unix:///disk?socket={tmp_path}/nbd"
    with started("qemu-io", "-f", "raw", "-c", "write 0 64k", "-c", "flush", "-c", "sleep 20000", uri):
        until(lambda: bool(client.execute("__org.nbdserve_status")["clients"]), "it is connected")
        changes = before["exports"][0]["changes"]
        until(lambda: client.execute("__org.nbdserve_status")["exports"][0]["changes"] > changes, "it has written")
        now = client.execute("__org.nbdserve_status")
    assert now["clients"][0]["export"] == "disk"
    assert now["exports"][0]["connections"] == 1
    assert now["uptime"] > before["uptime"]
    assert now["io"]["read-bytes"] >= before["io"]["read-bytes"]
    client.execute("nbd-server-stop")
