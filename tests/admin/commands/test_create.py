import json
from pathlib import Path
from typing import Any

import pytest

from tests.admin.clients import RawClient
from tests.admin.commands.test_nodes import nodes
from tests.admin.images import needs_images
from tests.cli.processes import output, until

pytestmark = needs_images


def create(client: RawClient, driver: str, **options: Any) -> str | None:
    """The error of the job, if it fails."""
    given = {name.replace("_", "-"): value for name, value in options.items()}
    assert client.execute("blockdev-create", job_id="j", options={"driver": driver} | given) == {}
    until(lambda: _job(client)["status"] == "concluded", "the job ends")
    error: str | None = _job(client).get("error")
    assert client.execute("job-dismiss", id="j") == {}
    return error


def _job(client: RawClient) -> dict[str, Any]:
    (job,) = client.execute("query-jobs")
    return dict(job)


def file_node(client: RawClient, path: Path, size: int = 0) -> None:
    assert create(client, "file", filename=str(path), size=size) is None
    assert client.execute("blockdev-add", driver="file", node_name="f", filename=str(path)) == {}


@pytest.mark.parametrize("driver", ["parallels", "qcow", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"])
def test_an_image_of_each_format(client: RawClient, images: Path, driver: str) -> None:
    path = images / "new"
    file_node(client, path, 512)
    size = {"vpc": 68 * 17 * 512 * 4}.get(driver, 1 << 20)
    more = {"force_size": True} if driver == "vpc" else {}
    assert create(client, driver, file="f", size=size, **more) is None
    assert nodes(client)["f"]["image"]["virtual-size"] >= path.stat().st_size > 512
    info = json.loads(output("qemu-img", "info", "-U", "--output=json", "-f", driver, path))
    assert info["virtual-size"] == size
    assert client.execute("blockdev-add", driver=driver, node_name="n", file="f") == {}
    assert client.execute("blockdev-del", node_name="n") == {}


def test_options(client: RawClient, images: Path, tmp_path: Path) -> None:
    file_node(client, images / "new")
    options = {"version": "v3", "cluster_size": 4096, "refcount_bits": 8, "lazy_refcounts": True}
    backing = {"backing_file": "a.qcow2", "backing_fmt": "qcow2"}
    assert create(client, "qcow2", file="f", size=1 << 20, **options, **backing) is None
    info = json.loads(output("qemu-img", "info", "-U", "--output=json", images / "new"))
    data = info["format-specific"]["data"]
    assert (info["cluster-size"], data["refcount-bits"], data["lazy-refcounts"]) == (4096, 8, True)
    assert (info["backing-filename"], info["backing-filename-format"]) == ("a.qcow2", "qcow2")
    key = tmp_path / "key"
    key.write_bytes(b"secret")
    assert client.execute("object-add", qom_type="secret", id="s", file=str(key)) == {}
    luks = {"key_secret": "s", "iter_time": 10}
    assert create(client, "luks", file="f", size=1 << 20, **luks) is None
    assert "luks" in output("qemu-img", "info", "-U", "-f", "luks", images / "new")


def test_what_fails(client: RawClient, images: Path) -> None:
    refused = client.execute("blockdev-create", job_id="j", options={"driver": "raw"})
    assert refused == "Driver does not support blockdev-create"
    assert create(client, "qcow2", file="zz", size=512) == "Cannot find device='zz' nor node-name='zz'"
    assert "outside the image roots" in str(create(client, "file", filename="/x", size=512))
    file_node(client, images / "new")
    assert "between 512 and 2048k" in str(create(client, "qcow2", file="f", size=512, cluster_size=5))
    assert create(client, "qcow2", file="f", size=513) == "Image size must be a multiple of 512 bytes"
    assert "No secret with id 'zz'" in str(create(client, "luks", file="f", size=512, key_secret="zz"))
    assert create(client, "qcow2", file="f", size=1 << 20) is None
    assert client.execute("blockdev-add", driver="qcow2", node_name="n", file="f") == {}
    assert create(client, "qcow2", file="f", size=512) == "Node 'f' is in use by node 'n'"
    assert "is no file" in str(create(client, "qcow2", file="n", size=512))
