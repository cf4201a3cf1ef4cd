"""Where whole clusters of a chain are, remembered: one dict access instead of a walk down the layers.

Only what the layers themselves said is kept, and only while it holds: every change of the mapping is followed by
``forget``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nbdserve.block.chain import resolve
from nbdserve.extents import DATA
from nbdserve.formats.base import FormatDriver
from nbdserve.units import is_power_of_two

LAYER_BITS: Final = 8
LAYER_MASK: Final = (1 << LAYER_BITS) - 1
_SMALLEST_CLUSTER: Final = 4096
"""Most requests are larger than smaller clusters, and are served from several."""
_MOST: Final = 1 << 15
"""Clusters remembered, 2 GiB of 64 KiB ones; then all are forgotten (7 MiB of memory for reading and writing)."""


class Places:
    """Two maps by cluster number of the top layer: both hold plain integers, which the garbage collector skips.

    ``readable``: host offset of the cluster, shifted by 8, and the index of the layer that has all of it in one run.
    ``writable``: host offset of the cluster, where all of it may be overwritten in place.
    """

    __slots__ = ("_layers", "_size", "bits", "cluster_size", "mask", "readable", "writable")

    def __init__(self, layers: Sequence[FormatDriver]) -> None:
        self._layers = layers
        self._size = layers[0].size
        self.cluster_size = layers[0].cluster_size
        self.bits = self.cluster_size.bit_length() - 1
        self.mask = self.cluster_size - 1
        self.readable: dict[int, int] = {}
        self.writable: dict[int, int] = {}

    @staticmethod
    def worthwhile(layers: Sequence[FormatDriver]) -> bool:
        """Whether requests mostly lie inside one cluster, and clusters and layers fit the numbers.

        A Parallels image may have clusters of any number of sectors.
        """
        cluster_size = layers[0].cluster_size
        return cluster_size >= _SMALLEST_CLUSTER and is_power_of_two(cluster_size) and len(layers) <= LAYER_MASK

    def learn_readable(self, offset: int) -> None:
        """Remember the cluster at ``offset`` if it is one run of data."""
        start = offset & ~self.mask
        wanted = min(self.cluster_size, self._size - start)
        kind, length, index, host_offset = resolve(self._layers, start, wanted)
        if kind == DATA and length == wanted:
            if len(self.readable) >= _MOST:
                self.readable.clear()
            self.readable[offset >> self.bits] = host_offset << LAYER_BITS | index

    def learn_writable(self, offset: int) -> None:
        """Remember the cluster at ``offset`` if all of it can be overwritten in one piece."""
        start = offset & ~self.mask
        wanted = min(self.cluster_size, self._size - start)
        run = self._layers[0].lookup_writable(start, wanted)
        if run is not None and run[0] == DATA and run[1] == wanted:
            if len(self.writable) >= _MOST:
                self.writable.clear()
            self.writable[offset >> self.bits] = run[2]

    def forget(self, offset: int, length: int) -> None:
        """The mapping of the range has changed."""
        first, end = offset >> self.bits, (offset + length + self.mask) >> self.bits
        if end - first == 1:
            self.readable.pop(first, None)
            self.writable.pop(first, None)
            return
        for known in (self.readable, self.writable):
            if end - first > len(known):
                for number in [number for number in known if first <= number < end]:
                    del known[number]
            else:
                for number in range(first, end):
                    known.pop(number, None)
