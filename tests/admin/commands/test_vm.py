from pathlib import Path

from tests.admin.clients import RawClient
from tests.admin.images import needs_images


def test_what_tools_for_machines_ask(client: RawClient) -> None:
    assert client.execute("query-status") == {"status": "running", "singlestep": False, "running": True}
    assert client.execute("query-name") == {}
    assert client.execute("query-tpm") == []
    assert client.execute("query-uuid")["UUID"].startswith("00000000")
    assert client.execute("qom-list", path="/objects") == [{"name": "type", "type": "string"}]
    assert client.execute("human-monitor-command", command_line="bogus") == "unknown command: 'bogus'\r\n"
    assert client.execute("human-monitor-command", command_line="info version").startswith("7.2.")
    assert "info block" in client.execute("human-monitor-command", command_line="help")
    assert client.execute("human-monitor-command", command_line="") == ""


def test_stop_and_cont(client: RawClient) -> None:
    client.send(b'{"execute":"stop"}')
    assert [client.receive().get("event"), client.receive().get("return")] == ["STOP", {}]
    assert client.execute("stop") == {}
    assert client.execute("query-status")["status"] == "paused"
    assert client.execute("human-monitor-command", command_line="info status") == "VM status: paused\r\n"
    client.send(b'{"execute":"cont"}')
    assert [client.receive().get("event"), client.receive().get("return")] == ["RESUME", {}]
    assert client.execute("cont") == {}


@needs_images
def test_objects_and_devices(client: RawClient, images: Path, tmp_path: Path) -> None:
    file = {"driver": "file", "filename": str(images / "o.qcow2")}
    unix = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    client.execute("nbd-server-start", addr=unix)
    client.execute("blockdev-add", driver="qcow2", node_name="o", file=file)
    client.execute("block-export-add", type="nbd", id="e", node_name="o")
    assert {"name": "e", "type": "child<nbd-export>"} in client.execute("qom-list", path="/exports")
    assert client.execute("qom-get", path="/exports/e", property="read-only") is True
    assert client.execute("qom-get", path="/exports", property="e") == "/exports/e"
    assert client.execute("qom-get", path="o", property="drive") == "o"
    assert client.execute("qom-set", path="o", property="drive", value="o") == {}
    client.execute("blockdev-add", driver="null-co", node_name="n")
    refused = client.execute("qom-set", path="/devices/o", property="drive", value="n")
    assert refused == "Node 'n' is neither 'o' nor a filter on it"
    assert client.execute("qom-set", path="o", property="size", value=5) == "Property 'disk.size' not found"
    assert client.execute("qom-set", path="o", property="drive", value=5).startswith("Invalid parameter type")
    assert client.execute("qom-set", path="/exports/e", property="name", value=5).endswith("is not writable")
    text = client.execute("human-monitor-command", command_line="info block")
    assert str(images / "a.qcow2") in text
    assert "export 'e'" in text
