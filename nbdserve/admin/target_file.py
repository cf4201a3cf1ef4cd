"""The image that ``drive-backup`` and ``drive-mirror`` copy a disk to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError, description_of
from nbdserve.admin.nodes import NodeEntry
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import DRIVERS
from nbdserve.storage.file import FileStorage

TargetMode: TypeAlias = Literal["existing", "absolute-paths"]

BASES: Final = {"none": 0, "top": 1}
"""Sync mode -> the layer of the disk that is the backing file of a new target."""


@dataclass(eq=False)
class TargetFile:
    """A file as a client names it. ``open`` it, and if nothing comes of it, ``remove`` it."""

    control: Control
    filename: str
    format: str | None
    """None: that of the disk, or, of an image that is there, what it is probed to be."""
    mode: TargetMode
    _made: str = ""
    _layers: Sequence[FormatDriver] = ()
    """Those of the source when it was opened."""

    async def open(self, source: NodeEntry, base: int | None = None) -> Node:
        """A new image of the size of ``source``, or the one that is there. QmpError, with nothing made.

        ``base``: the layer of the source that is the backing file of a new one. The top one, which others write, is
        named in the header and not read.
        """
        if self.format is not None and self.format not in DRIVERS:
            raise QmpError(f"Unknown file format '{self.format}'")
        self._layers = source.node.layers
        try:
            if self.mode == "existing":
                return await self._open_existing()
            return await self._create(source, base)
        except (ImageError, ConfigError, OSError) as error:
            await self.remove()
            raise QmpError(description_of(error)) from error
        except BaseException:
            await self.remove()
            raise

    def check(self, source: NodeEntry) -> None:
        """QmpError when ``source`` has other layers than at ``open``: an image over those would lack some of the disk.

        To be asked when the job is made, before which other clients may have taken a snapshot.
        """
        if source.node.layers != self._layers:
            raise QmpError(f"Node '{source.name}' has got other layers while the image was made: try again")

    async def _open_existing(self) -> Node:
        file = await self.control.paths.open(self.filename, read_only=False)
        return await self._open(ImageSpec(file.path, self.format, discard="unmap", opened=file))

    async def _open(self, spec: ImageSpec) -> Node:
        return await open_image(spec, await asyncio.to_thread(self.control.paths.image_roots))

    async def _create(self, source: NodeEntry, base: int | None) -> Node:
        driver = DRIVERS[self.format or source.node.format]
        if not driver.can("create"):
            raise QmpError(f"Format driver '{driver.name}' does not support image creation")
        below, options = _backing(source, base)
        size = source.node.size
        driver.validate_create(size, options)
        if driver.created_size(size, options) != size:
            raise QmpError(f"A {driver.name} image cannot have {size} bytes")
        if driver.created_companions(self.filename, size, options):
            raise QmpError(f"A {driver.name} image has more files than one: create it first, and give mode 'existing'")
        file, is_new = await self.control.paths.create(self.filename)
        self._made = file.path if is_new else ""
        await self._format(file, driver, options, below, size)
        backing: Literal["header"] | None = None if base == 0 else "header"
        return await self._open(ImageSpec(file.path, driver.name, discard="unmap", backing=backing, opened=file))

    async def _format(
        self,
        file: FileStorage,
        driver: type[FormatDriver],
        options: dict[str, str],
        below: FormatDriver | None,
        size: int,
    ) -> None:
        try:
            await driver.create(file, size, options, backing=below)
        except BaseException:
            await file.close()
            raise

    async def remove(self) -> None:
        """Remove the file if it was made."""
        if self._made:
            await self.control.paths.remove(self._made)
            self._made = ""


def _backing(source: NodeEntry, base: int | None) -> tuple[FormatDriver | None, dict[str, str]]:
    """The layer that is the backing file of a new image, and the options that say so."""
    layers = source.node.layers
    if base is None or base >= len(layers):
        return None, {}
    below = layers[base]
    return below, {"backing_file": below.path, "backing_fmt": below.name}
