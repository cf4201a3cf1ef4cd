"""QEMU's tools as an independent opinion: make images, change them, check and compare them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
"""Where crash states are materialised: in memory, where there is such a file system."""

HAVE_QEMU = bool(shutil.which("qemu-img") and shutil.which("qemu-io"))
needs_qemu = pytest.mark.skipif(not HAVE_QEMU, reason="qemu-img and qemu-io are not installed")


class ToolError(AssertionError):
    """A stock tool disagrees; the message has its command line and what it said."""


def run(
    *command: str | Path,
    codes: Iterable[int] = (0,),
    timeout: float = 120,
    stdin: str | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a tool; its standard output. ToolError when it exits with another code than one of ``codes``.

    ``cwd``: QEMU takes an external data file's relative name to be relative to this.
    """
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        input=stdin,
        cwd=cwd,
        check=False,
    )
    if done.returncode not in set(codes):
        shown = " ".join(str(part) for part in command)
        raise ToolError(f"{shown}\nexit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def create(
    path: Path,
    size: int | None,
    *,
    fmt: str = "qcow2",
    options: str = "",
    backing: tuple[str | Path, str] | None = None,
) -> None:
    """``qemu-img create``; ``backing`` is (file, format)."""
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", fmt]
    if options:
        command += ["-o", options]
    if backing is not None:
        command += ["-b", backing[0], "-F", backing[1]]
    run(*command, path, *([str(size)] if size is not None else []), cwd=path.parent)


def check(path: Path, fmt: str = "qcow2", *, leaks_allowed: bool = False) -> None:
    """``qemu-img check``: clean, or (after a crash) nothing worse than leaks."""
    run("qemu-img", "check", "-f", fmt, path, codes=(0, 3) if leaks_allowed else (0,), cwd=path.parent)


def compare(a: Path, a_fmt: str, b: Path, b_fmt: str, *, strict: bool = False) -> None:
    """``qemu-img compare``: the guest sees the same (of different sizes, the rest is zeroes unless ``strict``)."""
    run("qemu-img", "compare", *(["-s"] if strict else []), "-f", a_fmt, "-F", b_fmt, a, b, cwd=a.parent)


def convert(source: Path, fmt: str, target: Path, target_fmt: str, *extra: str) -> None:
    """``qemu-img convert``."""
    run(
        "qemu-img",
        "convert",
        "-f",
        fmt,
        "-O",
        target_fmt,
        *extra,
        source,
        target,
        cwd=(source if fmt != "raw" else target).parent,
    )


def raw_content(source: Path, fmt: str, scratch: Path) -> bytes:
    """What the guest sees of an image, read by qemu-img."""
    target = scratch / "converted.raw"
    convert(source, fmt, target, "raw")
    content = target.read_bytes()
    target.unlink()
    return content


def info(path: Path, fmt: str | None = None) -> dict[str, Any]:
    """``qemu-img info`` as a dict."""
    found: dict[str, Any] = json.loads(
        run("qemu-img", "info", "--output=json", *(["-f", fmt] if fmt else []), path, cwd=path.parent)
    )
    return found


def qemu_io(path: Path, fmt: str, commands: Sequence[str], *, timeout: float = 120) -> str:
    """Run commands in one qemu-io (write-back cache); a command that fails or does not verify is an error."""
    script = "\n".join([*commands, "quit"]) + "\n"
    out = run(
        "qemu-io", "-t", "writeback", "-d", "unmap", "-f", fmt, path, stdin=script, timeout=timeout, cwd=path.parent
    )
    if "failed" in out.lower() or "error" in out.lower() or "invalid" in out.lower():
        raise ToolError(f"qemu-io {path}:\n{out[-3000:]}")
    return out


def random_qemu_io(rng: random.Random, size: int, count: int, content: bytearray, *, unit: int = 512) -> list[str]:
    """``count`` random qemu-io commands; their effect is carried over to ``content``.

    Discards are left out: what they leave is undefined.
    """
    commands = []
    for _ in range(count):
        offset, length = random_range(rng, size, unit=unit)
        kind = rng.choice(("write", "write", "write", "zero", "zero unmap", "flush"))
        if kind == "write":
            pattern = rng.randrange(1, 256)
            commands.append(f"write -q -P {pattern} {offset} {length}")
            content[offset : offset + length] = bytes([pattern]) * length
        elif kind == "flush":
            commands.append("flush")
        else:
            commands.append(f"write -q -z {'-u ' if kind == 'zero unmap' else ''}{offset} {length}")
            content[offset : offset + length] = bytes(length)
    return commands


def random_range(rng: random.Random, size: int, *, unit: int = 512, largest: int = 1 << 20) -> tuple[int, int]:
    """A range inside ``size``: sizes spread over the magnitudes up to ``largest``, all multiples of ``unit``."""
    units = size // unit
    most = max(1, min(units, largest // unit))
    length = min(most, max(1, int(2 ** (rng.random() * most.bit_length()))))
    offset = rng.randrange(units - length + 1)
    return offset * unit, length * unit
