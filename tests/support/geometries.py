"""The shapes an image can have, made by qemu-img, with guest content that says where it came from."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdserve.block.node import Node
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.storage.base import Storage
from nbdserve.units import KIB, MIB
from tests.support import images
from tests.support.model import stamps
from tests.support.recording import ByteStorage

BASE_WRITE = 2
OWN_WRITE = 3
"""The serials that stand in the sectors of the backing file and of the image's own first content."""


@dataclass(frozen=True)
class Geometry:
    """One shape. Sizes in bytes."""

    name: str
    size: int
    fmt: str = "qcow2"
    options: str = ""
    """As after qemu-img's ``-o``."""
    data_file: bool = False
    data_file_raw: bool = False
    base: str = ""
    """The format of the backing file; empty: none."""
    base_size: int = 0
    base_options: str = ""
    own: bool = False
    """The image has content of its own from the start."""
    compressed: bool = False
    """That content, and the backing file's, is compressed where it can be."""
    snapshot: bool = False
    """The first content is also held by an internal snapshot."""

    def __str__(self) -> str:
        return self.name


@dataclass
class Image:
    """An image in memory: its files, its backing file, and what the guest sees."""

    geometry: Geometry
    contents: list[bytes]
    """The image file, then the external data file where there is one."""
    guest: bytes
    base: bytes = b""
    extra: dict[str, Any] = field(default_factory=dict)

    def write_to(self, folder: Path, contents: Sequence[bytes | bytearray] | None = None) -> Path:
        """Put the files (of this image, or in the state of ``contents``) where qemu-img can open them."""
        files = list(contents if contents is not None else self.contents)
        path = folder / f"image.{self.geometry.fmt}"
        path.write_bytes(files[0])
        if self.geometry.data_file:
            (folder / "image.data").write_bytes(files[1])
        if self.geometry.base and not (folder / "base").exists():
            (folder / "base").write_bytes(self.base)
        return path

    async def open(self, stores: Sequence[Storage], *, read_only: bool = False) -> Node:
        """A node over the image's files held by ``stores``."""
        geometry = self.geometry
        top = await driver_for(geometry.fmt).open(stores[0], {"companions": stores[1:]}, read_only=read_only)
        layers: list[FormatDriver] = [top]
        if geometry.base:
            base = ByteStorage(bytearray(self.base), "base", read_only=True)
            layers.append(await driver_for(geometry.base).open(base, {}, read_only=True))
        return Node(layers, unmap=True)


@functools.lru_cache(maxsize=64)
def build(geometry: Geometry, seed: int = 0) -> Image:
    """Make the image with qemu-img. The same seed gives the same guest content."""
    with tempfile.TemporaryDirectory(dir=images.SCRATCH) as name:
        folder = Path(name)
        path = make(geometry, folder, seed)
        contents = [path.read_bytes()]
        if geometry.data_file:
            contents.append((folder / "image.data").read_bytes())
        guest = images.raw_content(path, geometry.fmt, folder)
        base = (folder / "base").read_bytes() if geometry.base else b""
    return Image(geometry, contents, guest, base)


def make(geometry: Geometry, folder: Path, seed: int = 0) -> Path:
    """Make the files ``image.<format>``, ``image.data`` and ``base`` in ``folder``; the image."""
    rng = random.Random(f"{geometry.name}/{seed}")
    options = geometry.options
    if geometry.data_file:
        options += ",data_file=image.data" + (",data_file_raw=on" if geometry.data_file_raw else "")
    options = options.strip(",")
    backing = None
    if geometry.base:
        source = _stamped(folder / "base.src", geometry.base_size, BASE_WRITE, rng)
        _convert(source, folder / "base", geometry.base, geometry.base_options, geometry.compressed)
        source.unlink()
        backing = ("base", geometry.base)
    path = folder / f"image.{geometry.fmt}"
    images.create(path, geometry.size, fmt=geometry.fmt, options=options, backing=backing)
    if geometry.own and backing is None and not geometry.data_file:
        source = _stamped(folder / "own.src", geometry.size, OWN_WRITE, rng)
        path.unlink()
        _convert(source, path, geometry.fmt, options, geometry.compressed)
        source.unlink()
    elif geometry.own:
        _write_own(path, geometry, rng, folder)
    if geometry.snapshot:
        images.run("qemu-img", "snapshot", "-c", "first", path)
    return path


def _stamped(path: Path, size: int, serial: int, rng: random.Random) -> Path:
    """A raw file about half of which is data."""
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12):
            offset, length = images.random_range(rng, size, largest=max(512, size // 6))
            file.seek(offset)
            file.write(stamps(serial, offset, length))
    return path


def _convert(source: Path, target: Path, fmt: str, options: str, compressed: bool) -> None:
    extra = ["-c"] if compressed and fmt == "qcow2" else []
    images.convert(source, "raw", target, fmt, *extra, *(["-o", options] if options else []))


def _write_own(path: Path, geometry: Geometry, rng: random.Random, folder: Path) -> None:
    """Own content for an image that qemu-img convert cannot fill: written by qemu-io from a file of stamps."""
    commands = []
    for i in range(8):
        offset, length = images.random_range(rng, geometry.size, largest=max(512, geometry.size // 8))
        source = folder / f"own{i}.src"
        source.write_bytes(stamps(OWN_WRITE, offset, length))
        commands.append(f"write -q -s {source} {offset} {length}")
    images.qemu_io(path, geometry.fmt, commands)
    for source in folder.glob("own*.src"):
        source.unlink()


CRASH_GEOMETRIES = (
    Geometry("512", 512 * KIB, options="cluster_size=512"),
    Geometry("512-rb64", 1 * MIB, options="cluster_size=512,refcount_bits=64"),
    Geometry("512-rb1", 768 * KIB, options="cluster_size=512,refcount_bits=1"),
    Geometry("512-backing", 512 * KIB, options="cluster_size=512", base="raw", base_size=384 * KIB),
    Geometry("512-snapshot", 512 * KIB, options="cluster_size=512", own=True, snapshot=True),
    Geometry("512-rb64-snapshot", 768 * KIB, options="cluster_size=512,refcount_bits=64", own=True, snapshot=True),
    Geometry(
        "512-rb64-full",
        1792 * KIB,
        options="cluster_size=512,refcount_bits=64,preallocation=metadata",
        snapshot=True,
    ),
    Geometry("1k-compressed", 1 * MIB, options="cluster_size=1024", own=True, compressed=True),
    Geometry("4k", 2 * MIB, options="cluster_size=4k"),
    Geometry("4k-rb1", 2 * MIB, options="cluster_size=4k,refcount_bits=1"),
    Geometry("4k-rb64", 2 * MIB, options="cluster_size=4k,refcount_bits=64"),
    Geometry("4k-v2", 2 * MIB, options="cluster_size=4k,compat=0.10", own=True),
    Geometry("4k-backing", 2 * MIB, options="cluster_size=4k", base="qcow2", base_size=1 * MIB, own=True),
    Geometry("4k-v2-backing", 2 * MIB, options="cluster_size=4k,compat=0.10", base="raw", base_size=1 * MIB, own=True),
    Geometry("4k-snapshot", 2 * MIB, options="cluster_size=4k", own=True, snapshot=True),
    Geometry("4k-compressed", 2 * MIB, options="cluster_size=4k", own=True, compressed=True),
    Geometry("512-data", 512 * KIB, options="cluster_size=512", data_file=True),
    Geometry("4k-data", 2 * MIB, options="cluster_size=4k", data_file=True, own=True),
    Geometry("4k-data-raw", 2 * MIB, options="cluster_size=4k", data_file=True, data_file_raw=True),
    Geometry("64k", 4 * MIB, options="cluster_size=64k"),
    Geometry("64k-backing", 4 * MIB, options="cluster_size=64k", base="raw", base_size=5 * MIB),
    Geometry("16k-ext", 2 * MIB, options="cluster_size=16k,extended_l2=on"),
    Geometry("16k-ext-backing", 2 * MIB, options="cluster_size=16k,extended_l2=on", base="qcow2", base_size=1 * MIB),
    Geometry("64k-ext-snapshot", 4 * MIB, options="cluster_size=64k,extended_l2=on", own=True, snapshot=True),
    Geometry("64k-ext-data", 4 * MIB, options="cluster_size=64k,extended_l2=on", data_file=True, own=True),
    Geometry("raw", 1 * MIB, fmt="raw"),
)

DIFFERENTIAL_GEOMETRIES = (
    *CRASH_GEOMETRIES,
    Geometry("2m", 24 * MIB, options="cluster_size=2M"),
    Geometry("2m-backing", 24 * MIB, options="cluster_size=2M", base="raw", base_size=10 * MIB, own=True),
    Geometry("2m-ext-backing", 24 * MIB, options="cluster_size=2M,extended_l2=on", base="qcow2", base_size=30 * MIB),
    Geometry("64k-long-base", 6 * MIB, options="cluster_size=64k", base="qcow2", base_size=9 * MIB, own=True),
    Geometry("64k-short-base", 6 * MIB, options="cluster_size=64k", base="raw", base_size=3 * MIB + 512),
    Geometry(
        "64k-compressed-base",
        6 * MIB,
        options="cluster_size=64k",
        base="qcow2",
        base_size=5 * MIB,
        base_options="cluster_size=64k",
        compressed=True,
    ),
    Geometry("64k-zstd", 6 * MIB, options="cluster_size=64k,compression_type=zstd", own=True, compressed=True),
    Geometry("64k-ext-compressed", 6 * MIB, options="cluster_size=64k,extended_l2=on", own=True, compressed=True),
    Geometry("64k-odd", 5 * MIB + 512, options="cluster_size=64k", base="raw", base_size=5 * MIB + 512 * 3),
    Geometry("64k-data-raw", 6 * MIB, options="cluster_size=64k", data_file=True, data_file_raw=True, own=True),
    Geometry("32k-rb2", 6 * MIB, options="cluster_size=32k,refcount_bits=2", own=True, snapshot=True),
)


def named(geometries: Sequence[Geometry], name: str) -> Geometry:
    """The geometry called ``name``."""
    return next(geometry for geometry in geometries if geometry.name == name)
