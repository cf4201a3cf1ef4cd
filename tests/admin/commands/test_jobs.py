import time
from pathlib import Path
from typing import Any

from tests.admin.clients import SECONDS, RawClient
from tests.admin.commands.test_nodes import add
from tests.admin.images import needs_images


def wait_for(client: RawClient, identity: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while True:
        for job in client.execute("query-block-jobs"):
            if (job["device"], job["status"]) == (identity, status):
                return dict(job)
        assert time.monotonic() < deadline, client.execute("query-jobs")
        time.sleep(0.02)


@needs_images
def test_the_life_of_a_job(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    assert client.execute("blockdev-add", driver="null-co", node_name="t", size=1 << 20) == {}
    assert client.execute("blockdev-mirror", job_id="m", device="q", target="t", sync="full", auto_dismiss=False) == {}
    assert wait_for(client, "m", "ready")["ready"] is True
    assert client.execute("job-dismiss", id="m") == "Job 'm' in state 'ready' cannot accept command verb 'dismiss'"
    assert client.execute("job-pause", id="m") == {}
    assert client.execute("job-pause", id="m") == "Job is already paused"
    assert wait_for(client, "m", "standby")["paused"] is True
    assert client.execute("block-job-cancel", device="m") == "The block job for device 'm' is currently paused"
    assert client.execute("block-job-resume", device="m") == {}
    assert client.execute("block-job-set-speed", device="m", speed=1 << 20) == {}
    assert wait_for(client, "m", "ready")["speed"] == 1 << 20
    assert client.execute("blockdev-del", node_name="t") == "Node t is in use"
    assert client.execute("block-job-cancel", device="m") == {}
    wait_for(client, "m", "concluded")
    assert client.execute("blockdev-del", node_name="t") == {}
    (info,) = client.execute("query-jobs")
    assert (info["status"], info["type"], "error" in info) == ("concluded", "mirror", False)
    assert client.execute("job-finalize", id="m").endswith("cannot accept command verb 'finalize'")
    assert client.execute("job-dismiss", id="m") == {}
    assert client.execute("query-jobs") == []


@needs_images
def test_a_job_outlives_its_client_and_ends_with_the_server(admin_socket: str, images: Path) -> None:
    first = RawClient(admin_socket).negotiate()
    assert add(first, "qcow2", images / "a.qcow2", "q") == {}
    assert first.execute("blockdev-add", driver="null-co", node_name="t", size=1 << 20) == {}
    assert first.execute("blockdev-mirror", job_id="m", device="q", target="t", sync="full") == {}
    first.close()
    second = RawClient(admin_socket).negotiate()
    wait_for(second, "m", "ready")
    assert second.execute("job-cancel", id="m") == {}
    second.close()
