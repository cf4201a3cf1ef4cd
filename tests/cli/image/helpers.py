"""Running ``nbdserve image`` in this process, and qemu-img beside it."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdserve.cli.boundary import guarded
from nbdserve.cli.main import PROGRAM, run
from tests.cli.processes import SECONDS, interruptible, started


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def image(monkeypatch: Any, *arguments: str | Path) -> Ran:
    """``nbdserve image ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["nbdserve", "image", *map(str, arguments)])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = guarded(PROGRAM, run)
    return Ran(code, out.getvalue(), err.getvalue())


def converted(monkeypatch: Any, *arguments: str | Path) -> Ran:
    """``image convert ARGUMENTS``, which has to succeed."""
    ran = image(monkeypatch, "convert", *arguments)
    assert (ran.code, ran.err) == (0, ""), (arguments, ran)
    return ran


def qemu_img(*arguments: str | Path, cwd: Path | None = None) -> Ran:
    """``qemu-img ARGUMENTS``."""
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd)
    return Ran(done.returncode, done.stdout, done.stderr)


def make_chain(directory: Path) -> list[Path]:
    """Images of every kind in ``directory``, made by QEMU's tools; some of them a chain of three."""

    def io_(name: str, *commands: str, fmt: str = "qcow2") -> None:
        arguments = [part for command in commands for part in ("-c", command)]
        subprocess.run(["qemu-io", "-f", fmt, *arguments, name], check=True, cwd=directory, stdout=subprocess.DEVNULL)

    def create(name: str, *arguments: str, fmt: str = "qcow2") -> None:
        subprocess.run(["qemu-img", "create", "-q", "-f", fmt, name, *arguments], check=True, cwd=directory)

    create("base.raw", "5000192", fmt="raw")
    io_("base.raw", "write 64k 100k", "write 2M 1M", fmt="raw")
    create("middle", "-b", "base.raw", "-F", "raw", "-o", "cluster_size=4k", "8M")
    io_("middle", "write 1M 20k", "write -z 2100k 64k", "write -z 6M 64k", "discard 1028k 4k")
    subprocess.run(["qemu-img", "snapshot", "-c", "one", "middle"], check=True, cwd=directory)
    io_("middle", "write 1M 4k")
    subprocess.run(["qemu-img", "bitmap", "--add", "middle", "dirty"], check=True, cwd=directory)
    create("top", "-b", "middle", "-F", "qcow2", "20M")
    io_("top", "write 3M 300k", "write 12M 3k")
    create("preallocated", "-o", "preallocation=metadata", "100M")
    io_("preallocated", "write 3M 300k", "write 12M 3k")
    create("extended", "-o", "extended_l2=on,cluster_size=64k", "20M")
    io_("extended", "write 3M 64k", "write -z 16M 4k")
    create("external", "-o", "data_file=external.raw", "20M")
    io_("external", "write 3M 30k", "write 12M 3k", "write -z 16M 4k")
    create("external_raw", "-o", "data_file=external_raw.raw,data_file_raw=on", "20M")
    io_("external_raw", "write 3M 30k", "write -z 16M 4k")
    create("old", "-o", "compat=0.10", "20M")
    io_("old", "write 3M 30k", "discard 3M 64k", "write 5M 1M")
    (directory / "source").write_bytes(bytes(range(256)) * 4096)
    for name, option in (("deflated", "compression_type=zlib"), ("zstd", "compression_type=zstd")):
        convert = ["qemu-img", "convert", "-f", "raw", "-c", "-O", "qcow2", "-o", option, "source", name]
        subprocess.run(convert, check=True, cwd=directory)
    io_("deflated", "write 128k 64k")
    create("empty", "0")
    names = [
        "base.raw",
        "middle",
        "top",
        "preallocated",
        "extended",
        "external",
        "external_raw",
        "old",
        "deflated",
        "zstd",
        "empty",
    ]
    return [directory / name for name in names]


MARK: Final = b"\xd7" * 512
_HANGS: Final = """
import asyncio
import sys
from nbdserve.cli.main import main
from nbdserve.storage.file import FileStorage

mark, left = eval(sys.argv.pop(1)), 1

def hanging(real):
    async def method(self, *arguments):
        global left
        pieces = arguments[0] if len(arguments) == 1 else [arguments]
        if any(mark in bytes(data) for _, data in pieces):
            left -= 1
            if left < 0:
                print("in the middle", flush=True)
                while not any(task.cancelling() for task in asyncio.all_tasks()):
                    await asyncio.sleep(0.02)
        await real(self, *arguments)
    return method

FileStorage.write, FileStorage.write_all = hanging(FileStorage.write), hanging(FileStorage.write_all)
main()
"""


def interrupted(*arguments: str | Path, mark: str = repr(MARK), by: signal.Signals = signal.SIGINT) -> Ran:
    """``nbdserve image ARGUMENTS`` in a process of its own, which gets the signal at the second write of ``mark``.

    That write lasts until then, and is done if it is not cut short.
    """
    with interruptible(), started(sys.executable, "-c", _HANGS, mark, "image", *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(by)
        out, err = process.communicate(timeout=SECONDS)
    return Ran(process.returncode, out, err)


def marked(path: Path, form: str = "raw", *options: str | Path) -> Path:
    """An image with runs of MARK at its beginning and 8 MiB further on."""
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *map(str, options), str(path), "12M"], check=True)
    writes = ["-c", "write -P 0xd7 0 256k", "-c", "write -P 0xd7 8M 256k"]
    subprocess.run(["qemu-io", "-f", form, *writes, str(path)], check=True, stdout=subprocess.DEVNULL)
    return path
