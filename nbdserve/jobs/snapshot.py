"""External snapshots: a new, empty layer on top takes the writes, and what was there stays as it is."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nbdserve.block.drain import drained
from nbdserve.block.graph import Origin
from nbdserve.block.node import Node
from nbdserve.block.reopening import close_to_writing, reopen
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError, JobError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.storage.directory import sync_parent
from nbdserve.storage.file import FileStorage
from nbdserve.storage.roots import ImageRoots


async def create_overlay(
    path: str,
    format_name: str,
    node: Node,
    *,
    options: Mapping[str, str] | None = None,
    backing_name: str | None = None,
    roots: ImageRoots | None = None,
    make: Callable[[], Awaitable[FileStorage]] | None = None,
) -> FormatDriver:
    """A new image at ``path`` over the top layer of ``node``, open for writing.

    ``options`` are those of ``create``; ``backing_name`` is how the header names the layer, its absolute path unless
    both are in one directory; ``make`` opens the file, empty, and is then the one to remove it again. ConfigError,
    ImageError or OSError; a file that was not there before is removed then.
    """
    driver = driver_for(format_name)
    below = node.top
    made = dict(options or {}) | {
        "backing_file": backing_name or name_from(path, below.path),
        "backing_fmt": below.name,
    }
    driver.validate_create(node.size, made)
    if driver.created_size(node.size, made) != node.size:
        raise ConfigError(f"{path}: a {format_name} image cannot have the {node.size} bytes of {node.path}")
    if driver.created_companions(path, node.size, made):
        raise ConfigError(f"{path}: a snapshot of more than one file: create it first")
    is_new = make is None and _is_new(path)
    try:
        storage = await (FileStorage.open(path, create=True) if make is None else make())
        try:
            await driver.create(storage, node.size, made, backing=below)
            layer = await driver.open(storage, {"has_backing": True, "discard": "unmap"}, read_only=False)
        except BaseException:
            await storage.close()
            raise
        if is_new:
            await sync_parent(path)
    except BaseException:
        if is_new:
            _remove(path)
        raise
    spec = ImageSpec(path, format_name, discard="unmap", backing=None)
    layer.origin = Origin(spec, roots or ImageRoots.of_image(path))
    return layer


def name_from(path: str, other: str) -> str:
    """How the header of the image ``path`` names ``other``: without a directory if they are in the same one."""
    beside = Path(path).absolute().parent == Path(other).absolute().parent
    return Path(other).name if beside else str(Path(other).absolute())


def _is_new(path: str) -> bool:
    return not os.path.lexists(path)


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


async def snapshot(pairs: Sequence[tuple[Node, FormatDriver]]) -> None:
    """Put each overlay, empty and open for writing, on top of its node: all of them at one moment, or none.

    JobError while a job works on a node, and for an overlay of another size or open read-only; the error of the flush
    of a layer that stops being the top one. The overlays are the nodes' from here on, or, if it fails, the caller's.
    """
    for node, overlay in pairs:
        if node.busy_with:
            raise JobError(f"Node '{node.path}' is busy: block device is in use by block job: {node.busy_with}")
        if overlay.size != node.size:
            raise JobError(f"The overlay has {overlay.size} bytes, and the disk {node.size}")
        if overlay.read_only:
            raise JobError(f"{overlay.path}: the overlay is open read-only")
    async with drained(*(node for node, _ in pairs)):
        for node, overlay in pairs:
            overlay.accept_backing(node.top)
            await node.flush()
        for node, overlay in pairs:
            node.replace_layers([overlay, *node.layers])
        for node, _ in pairs:
            await close_to_writing(node, 1)


async def undo(node: Node) -> FormatDriver:
    """Take the overlay off again that ``snapshot`` has put on ``node``; inside the same ``drained``, for it is empty.

    It is the caller's to close. ImageError when the layer below it cannot be opened for writing again.
    """
    overlay = node.top
    node.replace_layers(node.layers[1:])
    if node.top.read_only:
        await reopen(node, 0, read_only=False)
    return overlay


async def as_overlay(image: Node, below: FormatDriver) -> FormatDriver:
    """The one layer of ``image``, opened again as an overlay of ``below``, which it is then put on.

    What it does not have is then that layer's, and what is discarded in it is zeroes. ImageError as ``reopen``.
    """
    layer = image.top
    if isinstance(layer.origin, Origin):
        spec = replace(layer.origin.spec, backing=ImageSpec(below.path, below.name))
        layer.origin = replace(layer.origin, spec=spec)
    async with image.drained():
        return await reopen(image, 0, read_only=False)
