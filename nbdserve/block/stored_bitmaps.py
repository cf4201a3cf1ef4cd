"""Dirty bitmaps stored in the images of a chain, for exports that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver
from nbdserve.storage.roots import ImageRoots


async def open_with_bitmaps(spec: ImageSpec, roots: ImageRoots, names: Sequence[str]) -> tuple[Node, list[DirtyBitmap]]:
    """Open the chain under ``spec``, and the bitmaps stored in its images under these names.

    ConfigError for a name that is nowhere, for a bitmap that cannot be used, and for one in an image that would be
    written: its bitmaps are not kept up to date on disk. The image is as it was then. Else as ``open_image``.
    """
    if names and not (spec.read_only or spec.overlay or spec.snapshot is not None):
        await _refuse_written(spec, roots, names)
    node = await open_image(spec, roots)
    try:
        return node, [(await find_stored(node.layers, name))[0] for name in names]
    except BaseException:
        await node.close()
        raise


async def _refuse_written(spec: ImageSpec, roots: ImageRoots, names: Sequence[str]) -> None:
    node = await open_image(replace(spec, read_only=True), roots)
    try:
        for name in names:
            _, layer = await find_stored(node.layers, name)
            if layer is node.top:
                raise ConfigError(
                    f"Bitmap '{name}' is stored in {layer.path}, which is to be written, and would not be kept up to "
                    "date there: serve it read-only (-r)"
                )
    finally:
        await node.close()


async def find_stored(layers: Sequence[FormatDriver], name: str) -> tuple[DirtyBitmap, FormatDriver]:
    """The bitmap of that name, and the layer that has it: the first one from the top, as QEMU looks for it."""
    for layer in layers:
        bitmap = await layer.stored_bitmap(name)
        if bitmap is not None:
            bitmap.check_usable(reading=True)
            return bitmap, layer
    raise ConfigError(f"Bitmap '{name}' is not found")
