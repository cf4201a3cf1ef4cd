from pathlib import Path
from typing import Any

from tests.admin.clients import RawClient
from tests.admin.commands.test_jobs import wait_for
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


def finish(client: RawClient, identity: str) -> Any:
    """Dismiss the job once it is over; its error."""
    job = wait_for(client, identity, "concluded")
    assert client.execute("job-dismiss", id=identity) == {}
    return job.get("error")


def prepare(client: RawClient, images: Path) -> str:
    """``o`` over ``a``, which holds the letter a; the name of the node below ``o``."""
    output("qemu-io", "-c", "write -P 97 0 64k", images / "a.qcow2")
    output("qemu-io", "-c", "write -P 111 64k 64k", images / "o.qcow2")
    assert add(client, "qcow2", images / "o.qcow2", "o") == {}
    return next(name for name, info in nodes(client).items() if name.startswith("#") and info["drv"] == "qcow2")


def pattern(path: Path, letter: int, offset: str) -> None:
    assert "verification failed" not in output("qemu-io", "-r", "-c", f"read -P {letter} {offset} 64k", path)


def test_commit_of_the_active_layer(client: RawClient, images: Path) -> None:
    below = prepare(client, images)
    done = client.execute("block-commit", job_id="c", device="o", base_node=below, auto_dismiss=False)
    assert done == {}
    wait_for(client, "c", "ready")
    assert client.execute("job-complete", id="c") == {}
    assert finish(client, "c") is None
    assert nodes(client)["o"]["file"] == str(images / "a.qcow2")
    assert client.execute("blockdev-del", node_name="o") == {}
    pattern(images / "a.qcow2", 97, "0")
    pattern(images / "a.qcow2", 111, "64k")


def test_stream(client: RawClient, images: Path) -> None:
    prepare(client, images)
    assert client.execute("block-stream", job_id="s", device="o", auto_dismiss=False) == {}
    assert finish(client, "s") is None
    assert nodes(client)["o"]["backing_file_depth"] == 0
    assert client.execute("blockdev-del", node_name="o") == {}
    (images / "a.qcow2").unlink()
    pattern(images / "o.qcow2", 97, "0")
    pattern(images / "o.qcow2", 111, "64k")


def test_what_is_refused(client: RawClient, images: Path) -> None:
    below = prepare(client, images)
    both = client.execute("block-stream", job_id="s", device="o", bottom="o", base_node=below)
    assert both == "'bottom' cannot be specified together with 'base' or 'base-node'"
    wrong = client.execute("block-commit", job_id="c", device="o", top_node=below, base_node="o")
    assert wrong == "'top' and 'base' are not in the order of the chain"
    active = client.execute("block-commit", job_id="c", device="o", backing_file="x")
    assert active == "Cannot specify 'backing-file' when the active layer is the top"
    entire = client.execute("block-stream", job_id="s", device="o", backing_file="x")
    assert entire == "backing file specified, but streaming the entire chain"
    assert client.execute("block-stream", job_id="s", device="o", base_node="o").startswith("the base of a stream")
    assert client.execute("query-jobs") == []


def test_layers_and_files_keep_their_names(client: RawClient, images: Path) -> None:
    file = {"driver": "file", "node-name": "a-file", "filename": str(images / "a.qcow2")}
    assert (
        add(client, "qcow2", images / "o.qcow2", "o", backing={"driver": "qcow2", "node-name": "a", "file": file}) == {}
    )
    names = nodes(client).keys()
    assert client.execute("block-commit", job_id="c", device="o", base_node="a", auto_dismiss=False) == {}
    wait_for(client, "c", "ready")
    assert nodes(client).keys() == names
    assert client.execute("block-job-cancel", device="c") == {}
    assert finish(client, "c") is None
    assert nodes(client).keys() == names
    assert nodes(client)["a"]["file"] == str(images / "a.qcow2")
