"""What qemu-storage-daemon answers to a row of commands, right and wrong ones, is answered here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.admin.answers import ALL
from tests.admin.clients import RawClient, needs_daemon, storage_daemon
from tests.admin.images import make_images, needs_images


def check(client: RawClient, directory: Path, rows: list[tuple[str, dict[str, Any], str | None]]) -> None:
    for name, arguments, expected in rows:
        request = json.dumps({"execute": name, "arguments": arguments}).replace("{D}", str(directory))
        message = client.ask(request.encode())
        answer = message["error"]["desc"].replace(str(directory), "{D}") if "error" in message else None
        assert answer == expected, (name, arguments)


both = pytest.mark.parametrize("rows", ALL.values(), ids=ALL)


@needs_images
@both
def test_what_is_answered_here(client: RawClient, images: Path, rows: Any) -> None:
    check(client, images, rows)


@needs_images
@needs_daemon
@both
def test_the_table_is_what_qemu_answers(tmp_path: Path, rows: Any) -> None:
    make_images(tmp_path)
    with storage_daemon(tmp_path) as path:
        client = RawClient(path).negotiate()
        check(client, tmp_path, rows)
        client.close()
