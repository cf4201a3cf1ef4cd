"""Servers and clients as processes, each with a time limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SECONDS = 60.0
NBDSERVE = [sys.executable, "-m", "nbdserve.cli.main"]
QEMU_NBD = [sys.executable, "-m", "nbdserve.cli.qemu_nbd"]


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skip without these programs."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What is started here heeds SIGINT, also where this process was started in the background of a shell.

    A shell lets such a process ignore it, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(
    *argv: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished command."""
    return subprocess.run(
        list(map(str, argv)), cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=SECONDS,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def output(*argv: str | Path, cwd: Path | None = None) -> str:
    """What a command that must succeed prints."""
    done = run(*argv, cwd=cwd)
    assert done.returncode == 0, done
    return done.stdout


@contextlib.contextmanager
def started(*argv: str | Path, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end if it still runs."""
    process = subprocess.Popen(
        list(map(str, argv)),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for ``condition``."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def greets(path: Path) -> bool:
    """Whether a server says something to who connects to the unix socket.

    That it listens is not enough: its images may not be open yet, and a socket has its file before it listens.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        try:
            sock.connect(str(path))
            return sock.recv(1) != b""
        except OSError:
            return False


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    """Send the signal; the exit code."""
    process.send_signal(number)
    return process.wait(SECONDS)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
