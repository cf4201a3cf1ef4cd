"""Images made of geometries, with guest content that says where it came from."""

from __future__ import annotations

import asyncio
import functools
import random
import tempfile
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.create import create as image_create
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage
from tests.support import images
from tests.support.geometries.geometry import Geometry
from tests.support.images import Stock
from tests.support.model import stamps
from tests.support.recording import ByteStorage

BASE_WRITE = 2
OWN_WRITE = 3
"""The serials that stand in the sectors of the backing file and of the image's own first content."""
T = TypeVar("T")


@dataclass
class Image:
    """An image in memory: its files, those of its backing file, and what the guest sees."""

    geometry: Geometry
    names: list[str]
    """The image file, then its companions, as the header has them."""
    contents: list[bytes]
    guest: bytes
    base_names: list[str] = field(default_factory=list)
    base_contents: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Of the disk, bytes."""
        return len(self.guest)

    def write_to(self, folder: Path, contents: Sequence[bytes | bytearray] | None = None) -> Path:
        """Put the files (of this image, or in the state of ``contents``) where others can open them; the image."""
        for name, content in zip(self.names, self.contents if contents is None else contents, strict=True):
            (folder / name).write_bytes(content)
        for name, content in zip(self.base_names, self.base_contents, strict=True):
            if not (folder / name).exists():
                (folder / name).write_bytes(content)
        return folder / self.names[0]

    async def open(
        self, stores: Sequence[Storage], *, read_only: bool = False, keep_bitmaps: bool = False, **policy: Any
    ) -> Node:
        """A node over the image's files held by ``stores``."""
        geometry = self.geometry
        options = {
            "companions": list(stores[1:]),
            "has_backing": geometry.backing_by_user,
            "secret": geometry.secret or None,
            "keep_bitmaps": keep_bitmaps,
        }
        top = await driver_for(geometry.fmt).open(stores[0], options, read_only=read_only)
        layers: list[FormatDriver] = [top]
        if geometry.base:
            paths = [f"/{name}" for name in self.base_names]
            files = [
                ByteStorage(bytearray(content), path, read_only=True)
                for path, content in zip(paths, self.base_contents, strict=True)
            ]
            layers.append(await driver_for(geometry.base).open(files[0], {"companions": files[1:]}, read_only=True))
            top.accept_backing(layers[1])
        return Node(layers, **({"unmap": True} | policy))


@functools.lru_cache(maxsize=64)
def build(geometry: Geometry, seed: int = 0) -> Image:
    """Make the image. The same seed gives the same guest content."""
    with tempfile.TemporaryDirectory(dir=images.SCRATCH) as name:
        folder = Path(name)
        path, guest = make(geometry, folder, seed)
        image = Image(geometry, [path.name, *_companions(path, geometry.fmt)], [], guest)
        image.contents = [(folder / name).read_bytes() for name in image.names]
        if geometry.base:
            image.base_names = ["base", *_companions(folder / "base", geometry.base)]
            image.base_contents = [(folder / name).read_bytes() for name in image.base_names]
    return image


def make(geometry: Geometry, folder: Path, seed: int = 0) -> tuple[Path, bytes]:
    """Make the files (``image.<format>``, ``base``, companions) in ``folder``; the image, and what the guest sees."""
    rng = random.Random(f"{geometry.name}/{seed}")
    path = folder / f"image.{geometry.fmt}"
    guest = bytearray(geometry.size)
    if geometry.base:
        source = _stamped(folder / "base.src", geometry.base_size, BASE_WRITE, rng)
        content = source.read_bytes()[: geometry.size]
        guest[: len(content)] = content
        _convert(source, Stock(folder / "base", geometry.base), geometry.base_options, compressed=geometry.compressed)
        source.unlink()
    stock = stock_of(geometry, path)
    converted = geometry.own and not geometry.base and (geometry.fill == "convert" or geometry.make_from)
    if converted:
        source = _stamped(folder / "own.src", geometry.size, OWN_WRITE, rng)
        guest[:] = source.read_bytes()
        if geometry.make_from is not None:
            geometry.make_from(source, path)
        else:
            _convert(source, stock, geometry.options, compressed=geometry.compressed)
        source.unlink()
    else:
        _create(geometry, stock)
        if geometry.own:
            _write_own(geometry, stock, rng, guest)
    if geometry.snapshot:
        images.run("qemu-img", "snapshot", "-c", "first", path)
    guest.extend(bytes(_size_of(geometry, stock) - len(guest)))
    if geometry.noise:
        guest[:] = stock.raw_content(folder)
    elif geometry.stock and stock.raw_content(folder) != guest:
        raise AssertionError(f"{geometry}: qemu-img does not read what was put in")
    return path, bytes(guest)


def stock_of(geometry: Geometry, path: Path) -> Stock:
    """The image ``path`` as QEMU's tools are told of it."""
    return Stock(path, geometry.fmt, geometry.encryption, geometry.secret)


def spec_of(geometry: Geometry, path: Path, **fields: Any) -> ImageSpec:
    """The image ``path`` as our server is told of it."""
    if geometry.backing_by_user:
        fields["backing"] = ImageSpec(str(path.parent / "base"), geometry.base, read_only=True)
    elif geometry.base and not driver_for(geometry.fmt).declares_backing_format:
        fields["backing"] = ImageSpec("", geometry.base, read_only=True)
    return ImageSpec(str(path), geometry.fmt, secret=geometry.secret or None, **fields)


def apart(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in an event loop of its own, whether or not the caller runs in one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _companions(path: Path, fmt: str) -> list[str]:
    async def names() -> list[str]:
        storage = await FileStorage.open(str(path), read_only=True)
        try:
            return [companion.name for companion in await driver_for(fmt).companions(storage)]
        finally:
            await storage.close()

    return apart(names())


def _create(geometry: Geometry, stock: Stock) -> None:
    backing = ("base", geometry.base) if geometry.base else None
    if geometry.maker == "stock":
        images.create(
            stock.path,
            geometry.size,
            fmt=geometry.fmt,
            options=geometry.options,
            backing=None if geometry.backing_by_user else backing,
            objects=stock.objects,
        )
        return
    with ThreadPoolExecutor(1) as pool, tempfile.NamedTemporaryFile() as key:
        key.write(geometry.secret)
        key.flush()
        work = pool.submit(
            image_create,
            str(stock.path),
            str(geometry.size),
            geometry.fmt,
            "base" if backing else None,
            geometry.base or None,
            [geometry.options] if geometry.options else None,
            secret_file=key.name if geometry.secret else None,
            quiet=True,
        )
        assert work.result() == 0


def _size_of(geometry: Geometry, stock: Stock) -> int:
    """Of the disk: some formats round."""
    if geometry.stock:
        return int(images.info(stock.path, stock.fmt)["virtual-size"])
    if geometry.maker == "ours":
        return driver_for(geometry.fmt).created_size(geometry.size, _options(geometry.options))
    return geometry.size


def _options(text: str) -> dict[str, str]:
    return dict(item.partition("=")[::2] for item in text.split(",") if item)


def _stamped(path: Path, size: int, serial: int, rng: random.Random) -> Path:
    """A raw file about half of which is data."""
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12):
            offset, length = images.random_range(rng, size, largest=max(512, size // 6))
            file.seek(offset)
            file.write(stamps(serial, offset, length))
    return path


def _convert(source: Path, target: Stock, options: str, *, compressed: bool) -> None:
    extra = [*target.objects, *(["-c"] if compressed and target.fmt != "raw" else [])]
    images.convert(source, "raw", target.path, target.fmt, *extra, *(["-o", options] if options else []))


def _write_own(geometry: Geometry, stock: Stock, rng: random.Random, guest: bytearray) -> None:
    """Own content for an image that qemu-img convert cannot fill."""
    pieces = []
    for _ in range(8):
        offset, length = images.random_range(rng, geometry.size, largest=max(512, geometry.size // 8))
        pieces.append((offset, stamps(OWN_WRITE, offset, length)))
        guest[offset : offset + length] = pieces[-1][1]
    if geometry.fill == "ours":
        apart(_write_ours(geometry, stock.path, pieces))
        return
    commands = []
    for i, (offset, data) in enumerate(pieces):
        source = stock.path.parent / f"own{i}.src"
        source.write_bytes(data)
        commands.append(f"write -q -s {source} {offset} {len(data)}")
    stock.qemu_io(commands)
    for source in stock.path.parent.glob("own*.src"):
        source.unlink()


async def _write_ours(geometry: Geometry, path: Path, pieces: Sequence[tuple[int, bytes]]) -> None:
    node = await open_image(spec_of(geometry, path))
    try:
        for offset, data in pieces:
            await node.write(offset, data)
    finally:
        await node.close()
