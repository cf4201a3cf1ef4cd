"""Images of the two-level formats in memory, for tests of what they share."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdserve.block.node import Node
from nbdserve.formats.qcow.driver import QcowDriver
from nbdserve.formats.qed.driver import QedDriver
from nbdserve.formats.two_level.driver import TwoLevelDriver
from nbdserve.units import KIB, MIB
from tests.support.recording import ByteStorage


@dataclass(frozen=True)
class Shape:
    """A driver and how its image is made."""

    name: str
    driver: type[TwoLevelDriver]
    size: int
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    async def made(self) -> ByteStorage:
        """An empty image."""
        storage = ByteStorage(path=f"{self.name}.image")
        await self.driver.create(storage, self.size, self.options)
        return storage

    async def opened(self, storage: ByteStorage, *, read_only: bool = False, has_backing: bool = False) -> Node:
        """The image as a disk."""
        options = {"has_backing": has_backing}
        return Node([await self.driver.open(storage, options, read_only=read_only)], unmap=True)


SHAPES = (
    Shape("qed-4k", QedDriver, 4 * MIB, {"cluster_size": "4k", "table_size": "1"}),
    Shape("qed-4k-16", QedDriver, 40 * MIB, {"cluster_size": "4k", "table_size": "16"}),
    Shape("qed-64k", QedDriver, 8 * MIB),
    Shape("qed-1m", QedDriver, 24 * MIB, {"cluster_size": "1M", "table_size": "1"}),
    Shape("qcow-4k", QcowDriver, 5 * MIB),
    Shape("qcow-512", QcowDriver, 5 * MIB, {"backing_file": "base", "backing_fmt": "raw"}),
    Shape("qcow-tiny", QcowDriver, 512),
    Shape("qed-tiny", QedDriver, 512, {"cluster_size": "4k"}),
)
LARGE = tuple(shape for shape in SHAPES if shape.size >= 4 * MIB)

PIECE = 4 * KIB


def top(node: Node) -> TwoLevelDriver:
    """The driver of the image that is written."""
    driver = node.top
    assert isinstance(driver, TwoLevelDriver)
    return driver
