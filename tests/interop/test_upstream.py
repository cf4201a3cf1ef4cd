"""Images on another NBD server, a stock one: served on, looked at, and used across its restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.processes import greets, until
from tests.interop.conftest import Serve
from tests.interop.tools import NBDSERVE, make_disk, tool

MIB = 1 << 20


class Upstream:
    """A qemu-nbd that can be ended and started again."""

    def __init__(self, image: Path, image_format: str, socket: Path) -> None:
        self._argv = ["qemu-nbd", "-t", "-e", "8", "-k", str(socket), "-f", image_format, "--discard=unmap", str(image)]
        self.socket = socket
        self.uri = f"nbd+unix:///?socket={socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._argv)
        until(lambda: greets(self.socket), "qemu-nbd answers")

    def end(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None
        self.socket.unlink(missing_ok=True)


@contextmanager
def upstream(image: Path, image_format: str, directory: Path) -> Iterator[Upstream]:
    server = Upstream(image, image_format, directory / "upstream.sock")
    server.start()
    try:
        yield server
    finally:
        server.end()


needs_own_server = pytest.mark.skipif("INTEROP_SERVER" in os.environ, reason="about this server's own options")


STOCK_AND_OURS = (("qemu-img", ()), (NBDSERVE, ("image",)))


@needs_own_server
def test_image_commands_say_what_qemu_img_says(tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "qcow2", content)
    for shown_as, form in (("raw", image_format), ("qcow2", "raw")):
        with upstream(image, form, tmp_path) as server:
            for command in (["info"], ["map"]):
                argv = [*command, "--output=json", "-f", shown_as, server.uri]
                stock, ours = (json.loads(tool(program, *more, *argv)) for program, more in STOCK_AND_OURS)
                if command == ["info"]:
                    assert ours.pop("filename") == server.uri
                    stock.pop("filename")
                assert ours == stock


@needs_own_server
def test_a_chain_over_a_stock_server_across_its_restarts(serve: Serve, tmp_path: Path, content: bytes) -> None:
    """qcow2 and its refcounts live on the other server, which goes away while a client writes, twice."""
    image, _ = make_disk(tmp_path, "qcow2", content)
    with image.open("r+b") as file:  # room for new clusters: an export does not grow
        file.truncate(64 * MIB)
    with upstream(image, "raw", tmp_path) as server:
        below = {"driver": "nbd", "server": {"type": "unix", "path": str(server.socket)}, "reconnect-delay": 60}
        tree = "json:" + json.dumps({"driver": "qcow2", "file": below})
        with serve(Path(tree), "qcow2", "-x", "") as ours:
            for round_ in range(2):
                commands = [f"aio_write -P {round_ + 1} {at}k 8k" for at in range(round_, 16000, 251)]
                words = [word for command in (*commands, "aio_flush", "flush") for word in ("-c", command)]
                client = subprocess.Popen(
                    ["qemu-io", "-f", "raw", *words, ours.uri()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
                time.sleep(0.15)
                server.end(signal.SIGKILL if round_ else signal.SIGTERM)
                time.sleep(0.1)
                server.start()
                out, _ = client.communicate(timeout=60)
                assert client.returncode == 0, out.decode()
                assert b"failed" not in out, out.decode()
            expected = bytearray(content)
            for round_ in range(2):
                for at in range(round_, 16000, 251):
                    expected[at << 10 : (at + 8) << 10] = bytes([round_ + 1]) * (8 << 10)
            (tmp_path / "expected").write_bytes(expected)
            tool("qemu-img", "compare", "-f", "raw", "-F", "raw", ours.uri(), tmp_path / "expected")
    tool("qemu-img", "check", "-q", "-f", "qcow2", image)
    tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, tmp_path / "expected")
