from pathlib import Path

from tests.admin.clients import RawClient
from tests.admin.commands.test_backup import Disk
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


def test_what_clients_read_and_write_is_counted(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    (first,) = client.execute("query-blockstats")
    assert (first["device"], first["qdev"], first["node-name"]) == ("", "d", "d")
    assert first["stats"]["rd_bytes"] == first["stats"]["wr_operations"] == 0
    assert first["parent"]["stats"]["wr_highest_offset"] == (images / "a.qcow2").stat().st_size
    disk.write(98, "0")
    output("qemu-io", "-f", "raw", "-c", "read 0 4k", "-c", "read 512k 8k", "-c", "flush", disk.uri)
    (second,) = client.execute("query-blockstats")
    stats = second["stats"]
    assert (stats["rd_bytes"], stats["rd_operations"]) == (12288, 2)
    assert (stats["wr_bytes"], stats["wr_operations"], stats["wr_highest_offset"]) == (65536, 1, 65536)
    assert stats["flush_operations"] >= 1
    assert stats["failed_rd_operations"] == 0
    named = {each["node-name"]: each for each in client.execute("query-blockstats", query_nodes=True)}
    assert named["d"]["stats"]["rd_bytes"] == 12288
    assert "device" not in named["d"]
    assert len(named) == 2
    client.execute("nbd-server-stop")
