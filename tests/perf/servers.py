"""The servers compared: how each is started on a unix socket, and how it is ended."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A command line with ``{socket}``, ``{format}`` and ``{image}`` in it, and the formats it can serve."""

    name: str
    command: str
    formats: frozenset[str] = frozenset({"raw", "qcow2"})
    writes: bool = True

    def argv(self, image: Path, image_format: str, sock: Path) -> list[str]:
        """The words to run."""
        values = {"socket": str(sock), "format": image_format, "image": str(image)}
        return [word.format_map(values) for word in shlex.split(self.command)]


def program() -> str:
    """The ``nbdserve`` of the running Python's environment, else the one on PATH."""
    beside = Path(sys.executable).parent / "nbdserve"
    return str(beside) if beside.exists() else shutil.which("nbdserve") or "nbdserve"


def installed_command() -> str:
    """How to start it."""
    return f"{shlex.quote(program())} serve -k {{socket}} -f {{format}} -e 8 {{image}}"


QEMU_NBD = ServerKind("qemu-nbd", "qemu-nbd -f {format} -t -e 8 -k {socket} --cache=writeback {image}")
NBDKIT = ServerKind("nbdkit", "nbdkit -U {socket} -f file {image}", frozenset({"raw"}))


CEILING: Final = "ceiling"


def build_ceiling(directory: Path) -> ServerKind:
    """``ceiling.c``, compiled: what the client can do where the server hardly counts.

    It looks for requests for 20 us before it sleeps. RuntimeError without a C compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the ceiling is a C program, and there is no C compiler (Debian: apt-get install gcc)")
    program = directory / "ceiling"
    source = Path(__file__).with_name("ceiling.c")
    subprocess.run([compiler, "-O2", "-o", str(program), str(source)], check=True)
    return ServerKind(CEILING, f"{shlex.quote(str(program))} {{socket}} {{image}} 20", frozenset({"raw"}), writes=False)


@dataclass(slots=True)
class RunningServer:
    """One server process; ``uri`` reaches its default export."""

    process: subprocess.Popen[bytes]
    uri: str

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100  # USER_HZ is 100 in every Linux ABI

    def peak_rss_mib(self) -> float:
        """The largest resident set so far."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0.0


@contextmanager
def running(kind: ServerKind, image: Path, image_format: str) -> Iterator[RunningServer]:
    """The server, accepting connections; ended by SIGTERM (SIGKILL after 15 s) on leaving.

    RuntimeError with what it printed when it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="nbd-perf-") as directory, tempfile.TemporaryFile() as output:
        sock = Path(directory) / "s"
        argv = kind.argv(image, image_format, sock)
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            if not _accepts(sock, process):
                output.seek(0)
                said = output.read().decode(errors="replace").strip()
                raise RuntimeError(f"{kind.name} does not listen: {shlex.join(argv)}\n{said}")
            yield RunningServer(process, f"nbd+unix:///?socket={sock}")
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _accepts(sock: Path, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(sock))
            except OSError:
                time.sleep(0.02)
                continue
            return True
    return False
