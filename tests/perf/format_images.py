"""The images of the other formats, converted by qemu-img from the raw disk of random bytes."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from tests.perf.cases import CHAIN_TOP_PART, Case
from tests.perf.format_cases import FORMATS, RAW_COW, ImageFormat
from tests.perf.images import Images, build, fill, run
from tests.perf.servers import QEMU_NBD, ServerKind, program

PASSPHRASE = "perf.secret"
_BASE, _DATA, _EQUIVALENT = "raw-cow.base", "raw-cow.data", "raw-cow.qcow2"


class FormatImages(Images):
    """The image of a case is the format's name; its file is ``disk.NAME``."""

    def format(self, case: Case) -> str:
        """The name of the format's driver."""
        return FORMATS[case.image].driver

    def path(self, case: Case) -> Path:
        """The image of the case."""
        return self.directory / f"disk.{case.image}"

    def serves(self, kind: ServerKind, case: Case) -> bool:
        """nbdkit and the ceiling read raw files only."""
        return "qcow2" in kind.formats

    def server(self, kind: ServerKind, case: Case) -> ServerKind:
        """``kind`` with the passphrase; for raw-cow, which QEMU has not, it serves the qcow2 image of the same disk."""
        wanted, secret = FORMATS[case.image], self.directory / PASSPHRASE
        peer = kind.name == QEMU_NBD.name
        if case.image == RAW_COW and peer:
            return replace(kind, command=_placed(kind.command, "qcow2", str(self.directory / _EQUIVALENT)))
        if not wanted.key_option:
            return kind
        if not peer:
            return replace(kind, command=f"{kind.command} --secret-file {secret}")
        opened = f"driver={wanted.driver},{_secret_options(wanted)},file.driver=file,file.filename={{image}}"
        command = kind.command.replace("-f {format} ", "").replace("{image}", f"--image-opts {opened}")
        return replace(kind, command=f"{command} --object secret,id=perf,file={secret}")

    def _files(self, case: Case) -> list[Path]:
        """The image, and what it takes its data from."""
        more = [_BASE, _DATA] if case.image == RAW_COW else []
        return [self.path(case), *(self.directory / name for name in more)]


def build_formats(directory: Path, size: int, names: set[str]) -> FormatImages:
    """Make the images of the formats; what is there already is kept while the raw disk is."""
    raw = directory / "disk.raw"
    if not (raw.exists() and raw.stat().st_size == size):
        for stale in (directory / f"disk.{name}" for name in FORMATS):
            stale.unlink(missing_ok=True)
    build(directory, size, set())
    images = FormatImages(directory, size)
    (directory / PASSPHRASE).write_bytes(b"measured")
    for name in sorted(names):
        image = directory / f"disk.{name}"
        if not image.exists():
            partial = directory / f"{name}.partial"
            if name == RAW_COW:
                _make_raw_cow(directory, partial, size)
            else:
                _convert(FORMATS[name], raw, partial, directory / PASSPHRASE)
            partial.rename(image)
        with image.open("rb") as file:
            os.fsync(file.fileno())
    return images


def _convert(wanted: ImageFormat, raw: Path, target: Path, secret: Path) -> None:
    options = wanted.options
    words = ["qemu-img", "convert", "-f", "raw", "-O", wanted.driver]
    if wanted.key_option:
        words += ["--object", f"secret,id=perf,file={secret}"]
        options += f",{wanted.key_option}=perf"
    if options:
        words += ["-o", options]
    run(*words, str(raw), str(target))


def _secret_options(wanted: ImageFormat) -> str:
    method = "encrypt.format=luks," if wanted.driver == "qcow2" else ""
    return f"{method}{wanted.key_option}=perf"


def _placed(command: str, image_format: str, image: str) -> str:
    return command.replace("{format}", image_format).replace("{image}", image)


def _make_raw_cow(directory: Path, target: Path, size: int) -> None:
    """Over a backing file of its own a raw file that has the first quarter whole, and clusters of the rest.

    QEMU fills it as the external data file of a qcow2 image, whose metadata are then imported.
    """
    base, data, equivalent = directory / _BASE, directory / _DATA, directory / _EQUIVALENT
    for stale in (data, equivalent):
        stale.unlink(missing_ok=True)
    shutil.copyfile(directory / "disk.raw", base)
    backing = ("-b", str(base), "-F", "raw")
    run("qemu-img", "create", "-q", "-f", "qcow2", *backing, "-o", f"data_file={data}", str(equivalent), str(size))
    fill(equivalent, size // CHAIN_TOP_PART, size // CHAIN_TOP_PART)
    fill(equivalent, size // 6, size)
    run(program(), "image", "raw-cow", "import", str(equivalent), str(target))
    for path in (base, data, equivalent):
        with path.open("rb") as file:
            os.fsync(file.fileno())
