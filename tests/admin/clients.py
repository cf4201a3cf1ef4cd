"""Admin clients that say exactly what a test wants said."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60.0

needs_daemon = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="not installed: qemu-storage-daemon"
)


class RawClient:
    """A connection whose bytes the test chooses. ``greeting`` is the server's."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.settimeout(SECONDS)
        self.sock.connect(address)
        self._file = self.sock.makefile("rb")
        self.greeting = self.receive()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> dict[str, Any]:
        """The next line; EOFError at the end."""
        line = self._file.readline()
        if not line:
            raise EOFError
        assert line.endswith(b"\r\n")
        assert line.isascii()
        return dict(json.loads(line))

    def reply(self) -> dict[str, Any]:
        """The next line that is no event."""
        while "event" in (message := self.receive()):
            pass
        return message

    def ask(self, request: bytes) -> dict[str, Any]:
        """The reply to one request."""
        self.send(request)
        return self.reply()

    def execute(self, name: str, /, **arguments: Any) -> Any:
        """The result of a command; its error's description, if it fails."""
        given = {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()}
        message = self.ask(json.dumps({"execute": name, "arguments": given}).encode())
        return message["error"]["desc"] if "error" in message else message["return"]

    def negotiate(self) -> RawClient:
        assert self.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}
        return self

    def close(self) -> None:
        self._file.close()
        self.sock.close()


def answers(client: RawClient, data: bytes) -> list[dict[str, Any]]:
    """What ``data`` is answered, up to the answer of a request sent behind it."""
    client.send(data + b'{"execute":"no-such-command","id":"end"}')
    got: list[dict[str, Any]] = []
    while (message := client.receive()).get("id") != "end":
        if "event" not in message:
            got.append(message)
    return got


@contextlib.contextmanager
def storage_daemon(directory: Path) -> Iterator[str]:
    """QEMU's own daemon; the path of its monitor, which takes one client at a time."""
    path = str(directory / "qsd.sock")
    argv = ["qemu-storage-daemon", "--chardev", f"socket,path={path},server=on,wait=off,id=c", "--monitor", "chardev=c"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while True:
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(path)
                    break
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield path
        finally:
            process.kill()
