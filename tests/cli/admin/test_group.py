import json
from pathlib import Path

from tests.admin.images import needs_images
from tests.cli.processes import NBDSERVE, output, run

ADMIN = [*NBDSERVE, "admin"]


@needs_images
def test_verbs_from_the_command_line(admin_socket: str, images: Path) -> None:
    admin = [*ADMIN, "-s", admin_socket]
    file = [f"file.filename={images}/b.raw", "file.driver=file"]
    assert output(*admin, "blockdev-add", "driver=raw", "node-name=r", *file) == ""
    assert json.loads(output(*admin, "query-named-block-nodes", "--output", "json"))[0]["node-name"] == "r"
    assert "node-name" in output(*admin, "query-block")
    refused = run(*admin, "blockdev-del", "node-name=x")
    assert (refused.returncode, refused.stderr) == (1, "nbdserve: Failed to find node with node-name='x'\n")
    assert json.loads(output(*admin, "status", "--output", "json"))["exports"] == []
    shell = output("sh", "-c", f"echo 'query-status' | {' '.join(admin)} shell")
    assert "running" in shell


def test_mistakes(tmp_path: Path) -> None:
    assert run(*ADMIN, "-s", tmp_path / "absent", "quit").returncode == 1
    unknown = run(*ADMIN, "query-status")
    assert unknown.returncode == 1
    assert "NBDSERVE_ADMIN" in unknown.stderr
    assert run(*ADMIN, "status", "--interval", "0").returncode == 2
