"""QEMU's tools as an independent opinion: make images, change them, check and compare them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def _in_memory() -> Path | None:
    """A writable file system in memory with room for what several processes make; containers have one of 64 MiB."""
    path = Path("/dev/shm")
    return path if os.access(path, os.W_OK) and shutil.disk_usage(path).free >= 1 << 30 else None


SCRATCH = _in_memory()
"""Where crash states are materialised: in memory, or else (None) where temporary files are."""

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


@dataclass(frozen=True)
class Stock:
    """An image as QEMU's tools are told of it, a passphrase included."""

    path: Path
    fmt: str
    encryption: str = ""
    """``luks`` or ``aes``: how the guest's data is encrypted inside the format."""
    secret: bytes = b""

    @property
    def objects(self) -> list[str]:
        """The passphrase, under the id ``s``."""
        return ["--object", f"secret,id=s,data={self.secret.decode()}"] if self.secret else []

    @property
    def arguments(self) -> list[str | Path]:
        """The image, for a command that takes one."""
        if not self.secret:
            return ["-f", self.fmt, self.path]
        key = f"encrypt.format={self.encryption},encrypt.key-secret=s" if self.encryption else "key-secret=s"
        return [*self.objects, "--image-opts", f"driver={self.fmt},{key},file.driver=file,file.filename={self.path}"]

    def check(self, *, codes: Iterable[int] = (0,)) -> None:
        """``qemu-img check``, ending with one of ``codes``."""
        run("qemu-img", "check", *self.arguments, codes=codes, cwd=self.path.parent)

    def repair(self) -> None:
        """``qemu-img check -r all``."""
        run("qemu-img", "check", "-q", "-r", "all", *self.arguments, cwd=self.path.parent)

    def raw_content(self, scratch: Path) -> bytes:
        """What the guest sees, read by qemu-img."""
        target = scratch / "converted.raw"
        run("qemu-img", "convert", "-O", "raw", *self.arguments, target, cwd=self.path.parent)
        content = target.read_bytes()
        target.unlink()
        return content

    def compare(self, raw: Path) -> None:
        """``qemu-img compare`` with a raw file."""
        command: list[str | Path] = ["qemu-img", "compare"]
        if self.secret:
            run(*command, *self.arguments, f"driver=raw,file.driver=file,file.filename={raw}", cwd=self.path.parent)
        else:
            run(*command, "-f", self.fmt, "-F", "raw", self.path, raw, cwd=self.path.parent)

    def qemu_io(self, commands: Sequence[str], *, timeout: float = 120) -> str:
        """Run commands in one qemu-io (write-back cache); a command that fails or does not verify is an error."""
        script = "\n".join([*commands, "quit"]) + "\n"
        mode = ["-t", "writeback", "-d", "unmap"]
        out = run("qemu-io", *mode, *self.arguments, stdin=script, timeout=timeout, cwd=self.path.parent)
        if "failed" in out.lower() or "error" in out.lower() or "invalid" in out.lower():
            raise ToolError(f"qemu-io {self.path}:\n{out[-3000:]}")
        return out


def create(
    path: Path,
    size: int | None,
    *,
    fmt: str = "qcow2",
    options: str = "",
    backing: tuple[str | Path, str] | None = None,
    objects: Sequence[str] = (),
) -> None:
    """``qemu-img create``; ``backing`` is (file, format), ``objects`` are further arguments."""
    command: list[str | Path] = ["qemu-img", "create", "-q", *objects, "-f", fmt]
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
    return Stock(source, fmt).raw_content(scratch)


def info(path: Path, fmt: str | None = None) -> dict[str, Any]:
    """``qemu-img info`` as a dict."""
    found: dict[str, Any] = json.loads(
        run("qemu-img", "info", "--output=json", *(["-f", fmt] if fmt else []), path, cwd=path.parent)
    )
    return found


def qemu_io(path: Path, fmt: str, commands: Sequence[str], *, timeout: float = 120) -> str:
    """Run commands in one qemu-io (write-back cache); a command that fails or does not verify is an error."""
    return Stock(path, fmt).qemu_io(commands, timeout=timeout)


def random_qemu_io(
    rng: random.Random, size: int, count: int, content: bytearray, *, unit: int = 512, zeroes: bool = True
) -> list[str]:
    """``count`` random qemu-io commands, with or without zeroing; their effect is carried over to ``content``.

    Discards are left out: what they leave is undefined.
    """
    commands = []
    for _ in range(count):
        offset, length = random_range(rng, size, unit=unit)
        kind = rng.choice(("write", "write", "write", *(("zero", "zero unmap") if zeroes else ()), "flush"))
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
