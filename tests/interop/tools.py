"""Running the server, the tools and the images they work on.

The command of the server is ``INTEROP_SERVER`` if that is set, with ``{listen}``, ``{format}``, ``{options}`` and
``{image}`` in it, so that the tests themselves can be tried on another server::

    INTEROP_SERVER='qemu-nbd -t -e 16 {listen} -f {format} {options} {image}' pytest tests/interop
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60
STOP_SECONDS = 60
TOOL_SECONDS = 120
NBDSERVE = Path(sys.executable).parent / "nbdserve"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server of one image."""

    process: subprocess.Popen[bytes]
    address: str
    """A socket's path, or HOST:PORT."""

    def uri(self, name: str = "") -> str:
        """The URI of the export ``name``; without, of the default export."""
        if ":" in self.address:
            return f"nbd://{self.address}/{name}"
        return f"nbd+unix:///{name}?socket={self.address}"

    def connect(self) -> socket.socket:
        """A connected socket."""
        if ":" in self.address:
            host, port = self.address.split(":")
            return socket.create_connection((host, int(port)), 60)
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(60)
        try:
            connected.connect(self.address)
        except OSError:
            connected.close()
            raise
        return connected


@contextmanager
def running_server(
    directory: Path, image: Path, image_format: str, options: Sequence[str] = (), *, tcp: bool = False
) -> Iterator[Server]:
    """The server, once it greets clients. Leaving sends SIGTERM and checks for exit code 0."""
    template = os.environ.get(
        "INTEROP_SERVER", f"{shlex.quote(str(NBDSERVE))} serve -t -e 16 {{listen}} -f {{format}} {{options}} {{image}}"
    )
    with socket.socket() as reserved:
        if tcp:
            # Nobody else is given a port that is bound; a server that sets SO_REUSEADDR can listen there all the same.
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]
            address, listen = f"127.0.0.1:{port}", f"-b 127.0.0.1 -p {port}"
        else:
            address = str(directory / "nbd.sock")
            listen = f"-k {shlex.quote(address)}"
        command = template.format(
            listen=listen, format=image_format, options=shlex.join(options), image=shlex.quote(str(image))
        )
        with _running(shlex.split(command), address, directory / "server.log") as server:
            yield server


@contextmanager
def _running(argv: list[str], address: str, log: Path) -> Iterator[Server]:
    with log.open("ab") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    server = Server(process, address)
    try:
        _wait_until_it_answers(server, argv, log)
        yield server
    finally:
        process.terminate()
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
    assert code == 0, f"the server ended with {code}:\n{log.read_text(errors='replace')}"


def tool(*argv: str | Path, code: int = 0, within: float = TOOL_SECONDS) -> str:
    """What the tool prints on standard output; AssertionError with everything it said unless it exits with ``code``."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=within, check=False)
    assert done.returncode == code, f"{shlex.join(map(str, argv))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def make_disk(directory: Path, kind: str, content: bytes) -> tuple[Path, str]:
    """An image with ``content`` in it and its format: ``raw``, ``qcow2``, or ``chain`` (raw <- qcow2 <- qcow2).

    In the chain the base has all of the content but for the second MiB, which is of the middle layer, and the third,
    which is of the top.
    """
    base = directory / "base.raw"
    if kind == "raw":
        base.write_bytes(content)
        return base, "raw"
    if kind == "qcow2":
        base.write_bytes(content)
        disk = directory / "disk.qcow2"
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, disk)
        return disk, "qcow2"
    mib = 1 << 20
    middle, top, part = directory / "middle.qcow2", directory / "top.qcow2", directory / "part"
    base.write_bytes(content[:mib] + b"\xee" * (2 * mib) + content[3 * mib :])
    for layer, below, below_format, start in ((middle, base, "raw", mib), (top, middle, "qcow2", 2 * mib)):
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", below.name, "-F", below_format, layer)
        part.write_bytes(content[start : start + mib])
        tool("qemu-io", "-f", "qcow2", "-c", f"write -s {part} {start} {mib}", layer)
    return top, "qcow2"


def _wait_until_it_answers(server: Server, argv: list[str], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            with server.connect() as connected:
                if connected.recv(1):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{shlex.join(argv)} does not answer:\n{log.read_text(errors='replace')}")
