import io
from typing import Any

from rich.console import Console

from nbdserve.cli.admin.client import AdminClient
from nbdserve.cli.admin.status import VERB, picture


def shown(before: Any, now: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(picture(before, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_picture(admin_socket: str) -> None:
    with AdminClient(admin_socket) as client:
        before = client.execute(VERB)
    export = {
        "id": "e", "name": "disk", "node-name": "n", "size": 1 << 30, "read-only": False, "connections": 1,
        "changes": 5,
    }  # fmt: skip
    before = before | {"exports": [export]}
    now = before | {
        "uptime": before["uptime"] + 3662,
        "exports": [export | {"changes": 5 + 3662 * 7}],
        "clients": [{"peer": "127.0.0.1:5", "export": "disk"}],
        "jobs": [{"id": "j", "type": "mirror", "status": "running", "current-progress": 1, "total-progress": 4}],
        "io": {"read-bytes": before["io"]["read-bytes"] + 3662 * 1024, "written-bytes": 0},
    }
    text = shown(before, now)
    for part in ("nbdserve test, up 1:01:02, running; read 1 KiB/s", "1 GiB", "7", "127.0.0.1:5", "mirror", "25 %"):
        assert part in text
    assert shown(before, before)
