"""The dirty bitmaps of a node: whatever changes the disk marks them before it is acknowledged (I7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdserve.bitmaps.bitmap import DEFAULT_GRANULARITY, DirtyBitmap
from nbdserve.bitmaps.bitmap_set import BitmapSet
from nbdserve.block.watchers import Watcher
from nbdserve.formats.base import FormatDriver
from nbdserve.units import KIB

if TYPE_CHECKING:
    from nbdserve.block.node import Node

_SMALLEST_DEFAULT: Final = 4 * KIB
_LARGEST_DEFAULT: Final = 64 * KIB


def default_granularity(layer: FormatDriver) -> int:
    """Bytes: the cluster size of the layer, between 4 and 64 KiB, as QEMU chooses."""
    if layer.name == "raw":
        return _LARGEST_DEFAULT
    return min(max(layer.cluster_size, _SMALLEST_DEFAULT), _LARGEST_DEFAULT)


class NodeBitmaps(BitmapSet, Watcher):
    """The bitmaps of one node, which they stay with when its layers change; it is watched while there are any.

    A bitmap added while writes are under way may miss those: add it inside ``Node.drained``.
    """

    def __init__(self, node: Node) -> None:
        super().__init__(node.size)
        self._node = node

    @property
    def default_granularity(self) -> int:
        """Bytes; see ``default_granularity``."""
        return default_granularity(self._node.top)

    def add(self, name: str | None, granularity: int = DEFAULT_GRANULARITY) -> DirtyBitmap:
        self.size = self._node.size  # without bitmaps nobody is told of a resize
        return super().add(name, granularity)

    def adopt(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        if not self:
            self._node.watch(self)
        return super().adopt(bitmap)

    def discard(self, bitmap: DirtyBitmap) -> None:
        had_some = bool(self)
        super().discard(bitmap)
        if had_some and not self:
            self._node.unwatch(self)

    def resized(self, old_size: int, size: int) -> None:
        self.resize(size)
