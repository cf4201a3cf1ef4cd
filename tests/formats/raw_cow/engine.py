"""raw-cow images in memory, and nodes over them."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdserve.block.node import Node
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.raw import RawDriver
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.storage.memory import MemoryStorage


class KeptStorage(MemoryStorage):
    """Keeps its bytes when it is closed, so that the image can be opened again."""

    async def close(self) -> None:
        pass


@dataclass
class Files:
    """The files of an image: its own, the raw one, and the backing file's content (None: there is none)."""

    base: bytes | None
    image: KeptStorage = field(default_factory=lambda: KeptStorage(path="vm.raw-cow"))
    raw: KeptStorage = field(default_factory=lambda: KeptStorage(path="vm.img"))

    async def create(self, size: int, **options: str) -> None:
        """Make the image."""
        chosen = {"raw_file": "vm.img"} | options
        if self.base is not None:
            chosen |= {"backing_file": "base", "backing_fmt": "raw"}
        RawCowDriver.validate_create(size, chosen)
        await RawCowDriver.create(self.image, size, chosen, companions=[self.raw])

    async def driver(self, *, read_only: bool = False) -> RawCowDriver:
        """Open the image alone."""
        return await RawCowDriver.open(self.image, {"companions": [self.raw]}, read_only=read_only)

    async def node(self, *, read_only: bool = False, unmap: bool = True) -> Node:
        """Open the chain."""
        top = await self.driver(read_only=read_only)
        layers: list[FormatDriver] = [top]
        if self.base is not None:
            layers.append(await RawDriver.open(MemoryStorage(self.base), {}, read_only=True))
        return Node(layers, unmap=unmap)
