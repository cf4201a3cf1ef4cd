"""The figures of a two-level mapping: what is where, and how large. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbdserve.units import KIB, align_down, align_up, div_ceil

SLICE_BYTES: Final = 64 * KIB
"""The part of an L2 table that is read, kept and dropped as one: all of it, unless it is larger."""


@dataclass(frozen=True, slots=True)
class TwoLevelGeometry:
    """Bytes, unless the name says otherwise."""

    size: int
    """The virtual size."""
    cluster_bits: int
    table_bytes: int
    """An L2 table: a power of two."""
    reserved: tuple[tuple[int, int], ...]
    """Host ranges ``[start, end)`` of header, backing file name and L1 table, where no L2 table and no cluster is."""
    alignment: int
    """Of tables and clusters in the file: the cluster size, or 1."""
    whole_clusters: bool
    """A last cluster that is not complete is no part of the image."""

    @property
    def cluster_size(self) -> int:
        """The unit of allocation."""
        return 1 << self.cluster_bits

    @property
    def table_clusters(self) -> int:
        """Clusters an L2 table takes."""
        return div_ceil(self.table_bytes, self.cluster_size)

    @property
    def slice_bytes(self) -> int:
        """See SLICE_BYTES."""
        return min(self.table_bytes, SLICE_BYTES)

    @property
    def slice_entries(self) -> int:
        """Entries of a slice."""
        return self.slice_bytes // 8

    @property
    def slices_per_table_bits(self) -> int:
        """log2 of the slices an L2 table has."""
        return (self.table_bytes // self.slice_bytes).bit_length() - 1

    @property
    def slice_shift(self) -> int:
        """log2 of the guest bytes a slice maps."""
        return self.cluster_bits + self.slice_entries.bit_length() - 1

    @property
    def l1_shift(self) -> int:
        """log2 of the guest bytes an L2 table maps."""
        return self.slice_shift + self.slices_per_table_bits

    def host_limit(self, file_size: int) -> int:
        """The host offset before which every cluster begins."""
        return align_down(file_size, self.cluster_size) if self.whole_clusters else file_size

    def end_of(self, file_size: int) -> int:
        """Where the next new cluster begins."""
        return (align_down if self.whole_clusters else align_up)(file_size, self.cluster_size)

    def compressed_range(self, entry: int) -> tuple[int, int]:
        """``(host_offset, length)`` of the stored form that an entry with bit 63 stands for (qcow)."""
        bits = 63 - self.cluster_bits
        return entry & (1 << bits) - 1, (entry >> bits) & self.cluster_size - 1
