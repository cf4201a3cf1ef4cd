"""``nbdserve image info``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from nbdserve.block.description import image_info
from nbdserve.block.graph import MAX_CHAIN_DEPTH
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FileArgument,
    ForceShareOption,
    FormatOption,
    ImageOptsOption,
    ObjectsOption,
    RootsOption,
    full_name,
    named_image,
    open_layer_of,
    open_layer_on,
    roots_for,
)
from nbdserve.cli.output import Output, OutputOption, print_json
from nbdserve.config.secrets import secrets_of_objects
from nbdserve.errors import ImageError
from nbdserve.formats.base import BitmapInfo, FormatDriver, ImageInfo, SnapshotInfo
from nbdserve.formats.encryption.storage import EncryptedStorage
from nbdserve.storage.file import FileStorage
from nbdserve.units import format_size

_NSEC: Final = 1_000_000_000
_ORDER: Final = (
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "data-file",
    "encrypt",
    "data-file-raw",
    "corrupt",
    "extended-l2",
)
"""In which qemu-img prints what is particular to qcow2."""


@dataclass(slots=True)
class Layer:
    """One image of a chain: its name, and what is known of it."""

    path: str
    info: ImageInfo
    disk_size: int | None
    """Bytes of disk space its files use, where that is known."""


def info(
    file: FileArgument,
    format_name: FormatOption = None,
    backing_chain: Annotated[
        bool, typer.Option("--backing-chain", help="The files below it as well, as the headers name them.")
    ] = False,
    force_share: ForceShareOption = False,
    output: OutputOption = Output.HUMAN,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    image_root: RootsOption = None,
) -> int:
    """Print what an image is: format, sizes, backing file, snapshots. The backing file stays closed."""
    flags = ImageSpec(file, format_name, force_share=force_share)
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    layers = asyncio.run(_collect(spec, backing_chain, image_root))
    if output is Output.JSON:
        shown = [as_json(layer) for layer in layers]
        print_json(shown if backing_chain else shown[0])
    else:
        print("\n".join(as_text(layer) for layer in layers), end="")
    return 0


async def _collect(spec: ImageSpec, backing_chain: bool, image_root: list[Path] | None) -> list[Layer]:
    path = spec.path
    roots = roots_for(path, image_root)
    layers: list[Layer] = []
    seen: set[object] = set()
    driver = await open_layer_of(spec, roots)
    while True:
        identity = getattr(driver.storage, "identity", None)
        if identity in seen:
            await driver.close()
            name = layers[-1].info.backing.name if layers[-1].info.backing else None
            raise ImageError(
                layers[-1].path, "the chain loops: it is a layer already", field="backing file", value=name
            )
        seen.add(identity)
        layers.append(await _describe(driver, path))
        backing = layers[-1].info.backing
        if not backing_chain or backing is None:
            return layers
        if backing.format is None:
            raise ImageError(
                path,
                "the header declares no format for it",
                field="backing file",
                value=backing.name,
                hint="ask for each image of the chain by itself",
            )
        if len(seen) >= MAX_CHAIN_DEPTH:
            raise ImageError(
                spec.path, f"the chain has more than {MAX_CHAIN_DEPTH} layers", field="backing file", value=path
            )
        fd = roots.open_beneath(backing.name, relative_to=path, flags=os.O_RDONLY | os.O_CLOEXEC)
        path = full_name(path, backing.name)
        storage = await FileStorage.from_fd(fd, path, force_share=spec.force_share)
        driver = await open_layer_on(storage, backing.format, roots, force_share=spec.force_share)


async def _describe(driver: FormatDriver, path: str) -> Layer:
    try:
        facts = driver.info()
        if bitmaps := await driver.stored_bitmaps():
            facts.specific["bitmaps"] = [_bitmap_json(bitmap) for bitmap in bitmaps]
        facts.specific = {key: facts.specific[key] for key in sorted(facts.specific, key=_position)}
        data = driver.data.inner if isinstance(driver.data, EncryptedStorage) else driver.data
        sizes = [file.allocated_size() for file in dict.fromkeys((driver.storage, data))]
        known = [size for size in sizes if size is not None]
        if not known and driver.name == "raw":
            facts.dirty = None  # as in qemu-img, which asks the server
        return Layer(path, facts, sum(known) if len(known) == len(sizes) else None)
    finally:
        await driver.close()


def _bitmap_json(bitmap: BitmapInfo) -> dict[str, Any]:
    flags = [name for name, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.auto)) if is_set]
    name = bitmap.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return {"flags": flags, "name": name, "granularity": bitmap.granularity}


def _position(key: str) -> int:
    return _ORDER.index(key) if key in _ORDER else len(_ORDER)


def as_json(layer: Layer) -> dict[str, Any]:
    """The object qemu-img prints."""
    return image_info(layer.path, layer.info, layer.disk_size)


def as_text(layer: Layer) -> str:
    """The same for people, as qemu-img lays it out."""
    facts = layer.info
    lines = [
        f"image: {layer.path}",
        f"file format: {facts.format}",
        f"virtual size: {format_size(facts.virtual_size)} ({facts.virtual_size} bytes)",
        f"disk size: {'unavailable' if layer.disk_size is None else format_size(layer.disk_size)}",
    ]
    if facts.encrypted:
        lines.append("encrypted: yes")
    if facts.cluster_size is not None:
        lines.append(f"cluster_size: {facts.cluster_size}")
    if facts.dirty:
        lines.append("cleanly shut down: no")
    if facts.backing is not None:
        full = full_name(layer.path, facts.backing.name)
        actual = f" (actual path: {full})" if full != facts.backing.name else ""
        lines.append(f"backing file: {facts.backing.name}{actual}")
        if facts.backing.format is not None:
            lines.append(f"backing file format: {facts.backing.format}")
    if facts.snapshots:
        lines += snapshot_lines(facts.snapshots)
    if facts.specific:
        lines.append("Format specific information:")
        lines += _specific_text(facts.specific, 1)
    return "\n".join(lines) + "\n"


def snapshot_lines(snapshots: Sequence[SnapshotInfo]) -> list[str]:
    """The table of internal snapshots, as qemu-img lays it out."""
    head = _snapshot_row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    return ["Snapshot list:", head, *map(_snapshot_text, snapshots)]


def _snapshot_row(identifier: str, tag: str, size: str, date: str, clock: str, icount: str) -> str:
    return f"{identifier:<10}{tag:<17}{size:>8}{date:>20}{clock:>13}{icount:>11}"


def _snapshot_text(snapshot: SnapshotInfo) -> str:
    seconds, rest = divmod(snapshot.vm_clock_nsec, _NSEC)
    return _snapshot_row(
        snapshot.id,
        snapshot.name,
        format_size(snapshot.vm_state_size),
        datetime.fromtimestamp(snapshot.date_sec).strftime("%Y-%m-%d %H:%M:%S"),
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest // 1_000_000:03}",
        "" if snapshot.icount is None else str(snapshot.icount),
    )


def _specific_text(value: dict[str, Any] | list[Any], depth: int) -> list[str]:
    indent = "    " * depth
    items = value.items() if isinstance(value, dict) else ((f"[{number}]", item) for number, item in enumerate(value))
    lines: list[str] = []
    for key, item in items:
        name = key.replace("-", " ")
        if isinstance(item, dict | list):
            lines.append(f"{indent}{name}:")
            lines += _specific_text(item, depth + 1)
        else:
            lines.append(f"{indent}{name}: {str(item).lower() if isinstance(item, bool) else item}")
    return lines
