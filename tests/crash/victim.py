"""A real server process under load that is killed with SIGKILL at some moment."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.model import ModelDisk
from tests.support.nbd import Connections
from tests.support.workload import Mix, Workload

CONNECTIONS = 4
SERVER = (sys.executable, "-c", "import sys; from nbdserve.cli.main import main; sys.exit(main())")
START_SECONDS = 60.0
STOP_SECONDS = 60.0


class KillFailure(AssertionError):
    """A promise was broken; the message says in which loop."""


@dataclass
class Result:
    """What was done."""

    loops: int = 0
    operations: int = 0
    flushes: int = 0
    seconds: float = 0.0
    geometries: set[str] = field(default_factory=set)


class Victim:
    """A server process on one image."""

    def __init__(self, image: Path, fmt: str, socket: Path, *options: str | Path) -> None:
        """``options`` are further ones of ``serve``."""
        self.socket = socket
        self.signalled = False
        """It has been told to end, by a signal."""
        socket.unlink(missing_ok=True)
        self.log = (socket.parent / "server.log").open("wb")
        self.process = subprocess.Popen(
            [*SERVER, "serve", "-f", fmt, "--discard", "unmap", "-k", socket, *options, image],
            stdout=self.log,
            stderr=self.log,
        )

    async def connect(self) -> Connections:
        """Connect as soon as it listens."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise KillFailure(f"the server does not come up:\n{self.said()}")
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                return await Connections.connect(self.socket, CONNECTIONS)
            await asyncio.sleep(0.02)

    def end(self) -> None:
        """Wait for the end that SIGTERM asked for: soon, and well."""
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise KillFailure(f"it has not ended {STOP_SECONDS} s after SIGTERM") from None
        if code:
            raise KillFailure(f"SIGTERM ended it with exit code {code}")

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    @property
    def complains(self) -> bool:
        """It has met what it did not expect."""
        return "Traceback" in self.said()

    def said(self) -> str:
        """The end of its output."""
        return (self.socket.parent / "server.log").read_text(errors="replace")[-3000:]


async def load(
    victim: Victim,
    model: ModelDisk,
    rng: random.Random,
    result: Result,
    *,
    delays: Sequence[float] = (0.02, 0.1, 0.3, 0.6),
    meanwhile: Callable[[], Awaitable[None]] | None = None,
    after: asyncio.Event | None = None,
    number: int = signal.SIGKILL,
) -> None:
    """Work over several connections until signal ``number``, which comes after about one of ``delays``, in seconds.

    ``meanwhile`` is run beside it, and ends when the server is gone; the delay begins with ``after``.
    """
    disk = await victim.connect()
    flushes = 0

    def acknowledged(apply: object, *, acknowledges: bool = False) -> None:
        nonlocal flushes
        flushes += acknowledges

    mix = Mix(in_flight=12, largest=256 << 10, fua=0.1, flush=2)
    workload = Workload(
        disk,
        model,
        random.Random(rng.random()),
        mix=mix,
        note=acknowledged,
        on_error=lambda error: victim.signalled and isinstance(error, OSError) and _is_end(error),
    )

    async def execute() -> None:
        if after is not None:
            await after.wait()
        await asyncio.sleep(rng.choice(delays) * (0.5 + rng.random()))
        victim.signalled = True
        workload.stop()
        victim.process.send_signal(number)

    tasks = [asyncio.create_task(execute())]
    if meanwhile is not None:
        tasks.append(asyncio.ensure_future(meanwhile()))
    try:
        result.operations += await workload.run(1 << 30)
    finally:
        await asyncio.gather(*tasks)
        await disk.close()
    result.flushes += flushes


def _is_end(error: OSError) -> bool:
    return isinstance(error, ConnectionError) or error.errno == errno.ESHUTDOWN
