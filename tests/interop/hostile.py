"""Images nobody should have to open, and the check that a command refuses them as it must.

The image the hostile ones are made from has 64 KiB clusters, a disk of 1 MiB over ``base.raw`` with 3 clusters of data,
and one internal snapshot.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.processes import greets, until
from tests.interop.tools import tool

BIN = Path(sys.executable).parent
NBDSERVE, QEMU_NBD = str(BIN / "nbdserve"), str(BIN / "nbdserve-qemu-nbd")
CLUSTER = 65536
LONGEST_MESSAGE = 300
"""Characters, the directory of the test not counted."""
SECONDS = 60
U32, U64 = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Field:
    """A header field: where it is, its struct format, and what messages call it."""

    at: int
    form: str
    name: str


FIELDS = {
    field.name: field
    for field in (
        Field(0, ">I", "magic"),
        Field(4, ">I", "version"),
        Field(8, ">Q", "backing_file_offset"),
        Field(16, ">I", "backing_file_size"),
        Field(20, ">I", "cluster_bits"),
        Field(24, ">Q", "size"),
        Field(32, ">I", "crypt_method"),
        Field(36, ">I", "l1_size"),
        Field(40, ">Q", "l1_table_offset"),
        Field(48, ">Q", "refcount_table_offset"),
        Field(56, ">I", "refcount_table_clusters"),
        Field(60, ">I", "nb_snapshots"),
        Field(64, ">Q", "snapshots_offset"),
        Field(72, ">Q", "incompatible_features"),
        Field(96, ">I", "refcount_order"),
        Field(100, ">I", "header_length"),
        Field(104, ">B", "compression_type"),
    )
}


def make_image(directory: Path) -> Path:
    """The image described above, ``disk.qcow2``."""
    (directory / "base.raw").write_bytes(b"b" * (1 << 20))
    image = directory / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", image, "1M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 128k", image)
    tool("qemu-img", "snapshot", "-c", "first", image)
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 2 512k 64k", image)
    return image


def overlay(image: Path, backing: str, backing_format: str | None = "raw", size: str = "1M") -> Path:
    """A qcow2 whose header names ``backing``, whatever that is."""
    tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", image, size)
    if backing_format is None:
        patch(image, image.read_bytes().index(struct.pack(">I", 0xE2792ACA)), struct.pack(">I", 0x11111111))
    elif backing_format != "raw":
        tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", backing, "-F", backing_format, image)
    return image


def patch(image: Path, at: int, data: bytes) -> None:
    """Overwrite bytes of the file."""
    with image.open("r+b") as file:
        file.seek(at)
        file.write(data)


def set_field(image: Path, name: str, value: int) -> None:
    """Overwrite a header field."""
    field = FIELDS[name]
    patch(image, field.at, struct.pack(field.form, value))


def get_field(image: Path, name: str) -> int:
    """A header field."""
    field = FIELDS[name]
    return int(struct.unpack_from(field.form, image.read_bytes(), field.at)[0])


def fingerprint(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, size and mtime (ns) of every regular file below ``directory``, and which other entries there are."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        digest = ""
        if stat.S_ISREG(status.st_mode):
            digest = hashlib.sha256(path.read_bytes() if status.st_size < 1 << 28 else b"").hexdigest()
        is_directory = stat.S_ISDIR(status.st_mode)
        found[str(path)] = (digest, 0 if is_directory else status.st_size, 0 if is_directory else status.st_mtime_ns)
    return found


def run(argv: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """The finished command."""
    words = [str(word) for word in argv]
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Nothing below ``directory`` changes, appears or disappears."""
    before = fingerprint(directory)
    yield
    assert fingerprint(directory) == before


def refused(directory: Path, argv: Sequence[str | Path], *names: object, code: int = 1) -> str:
    """The message with which the command refuses: one short line that has all ``names``; no file is changed."""
    with unchanged(directory):
        done = run(argv)
    assert done.returncode == code, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done
    assert "Traceback" not in done.stderr and "Error" not in lines[0].split(":")[1], done
    assert len(lines[0].replace(str(directory), "")) <= LONGEST_MESSAGE, done
    for name in names:
        assert str(name) in lines[0], (name, done)
    return lines[0]


def command(name: str, image: Path, *options: str) -> list[str | Path]:
    """One of the commands that open an image, by a short name."""
    sock = image.parent / "nbd.sock"
    commands: dict[str, list[str | Path]] = {
        "serve": [NBDSERVE, "serve", "-k", sock, *options, image],
        "qemu-nbd": [QEMU_NBD, "-k", sock, *options, image],
        "info": [NBDSERVE, "image", "info", *options, image],
        "check": [NBDSERVE, "image", "check", *options, image],
        "map": [NBDSERVE, "image", "map", "--output=json", *options, image],
        "create": [NBDSERVE, "image", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", image.parent / "new"],
    }
    return commands[name]


def shown(value: int) -> str:
    """As messages show a field's value."""
    return f"{value:#x}" if value > 9 else str(value)


def without_privilege(argv: Sequence[str | Path]) -> list[str | Path]:
    """The command, subject to file permissions although root runs it."""
    if os.geteuid() != 0:
        return list(argv)
    assert shutil.which("setpriv")
    dropped = "-dac_override,-dac_read_search,-fowner"
    return ["setpriv", f"--inh-caps={dropped}", f"--bounding-set={dropped}", *argv]


OPENING = ("serve", "qemu-nbd", "info", "check", "map", "create")
"""The commands that open an image by itself."""
FOLLOWING = ("serve", "qemu-nbd", "map")
"""The commands that open what its header names as well."""
PROGRAMS: list[list[str | Path]] = [[NBDSERVE, "serve"], [QEMU_NBD]]
IO_ERROR = "Input/output error"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mount needs root")


def url(directory: Path, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={directory}/nbd.sock"


def qemu_io(target: str | Path, *commands: str, form: str = "raw") -> subprocess.CompletedProcess[str]:
    arguments = [word for each in commands for word in ("-c", each)]
    return run(["qemu-io", "-f", form, *arguments, target])


@contextlib.contextmanager
def serving(directory: Path, argv: list[str | Path]) -> Iterator[subprocess.Popen[str]]:
    """The server, until SIGTERM ends it with exit code 0."""
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: greets(directory / "nbd.sock"), "it answers")
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
