"""What qemu-storage-daemon answers to a row of commands, right and wrong ones, is answered here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.admin.clients import RawClient, needs_daemon, storage_daemon
from tests.admin.images import make_images, needs_images
from tests.admin.qemu_answers import COMMANDS


def answers_of(client: RawClient, directory: Path) -> list[Any]:
    answers = []
    for name, arguments, _ in COMMANDS:
        request = json.dumps({"execute": name, "arguments": arguments}).replace("{D}", str(directory))
        message = client.ask(request.encode())
        answers.append(message["error"]["desc"].replace(str(directory), "{D}") if "error" in message else None)
    return answers


def compare(answers: list[Any]) -> None:
    for (name, arguments, expected), answer in zip(COMMANDS, answers, strict=True):
        assert answer == expected, (name, arguments)


@needs_images
def test_what_is_answered_here(client: RawClient, images: Path) -> None:
    compare(answers_of(client, images))


@needs_images
@needs_daemon
def test_the_table_is_what_qemu_answers(tmp_path: Path) -> None:
    make_images(tmp_path)
    with storage_daemon(tmp_path) as path:
        client = RawClient(path).negotiate()
        compare(answers_of(client, tmp_path))
        client.close()
