"""The figures of a two-level mapping."""

from __future__ import annotations

import pytest

from nbdserve.formats.two_level.geometry import TwoLevelGeometry
from nbdserve.units import KIB, MIB


def geometry(cluster_bits: int, table_bytes: int, *, whole: bool = True) -> TwoLevelGeometry:
    return TwoLevelGeometry(1 << 30, cluster_bits, table_bytes, (), 1 << cluster_bits, whole_clusters=whole)


@pytest.mark.parametrize(
    ("cluster_bits", "table_bytes", "slice_bytes", "parts", "clusters"),
    [
        (12, 4 * KIB, 4 * KIB, 0, 1),
        (12, 64 * KIB, 64 * KIB, 0, 16),
        (16, 256 * KIB, 64 * KIB, 2, 4),
        (26, 1024 * MIB, 64 * KIB, 14, 16),
        (9, 32 * KIB, 32 * KIB, 0, 64),
        (16, 512, 512, 0, 1),
    ],
)
def test_slices(cluster_bits: int, table_bytes: int, slice_bytes: int, parts: int, clusters: int) -> None:
    found = geometry(cluster_bits, table_bytes)
    assert (found.slice_bytes, found.slices_per_table_bits, found.table_clusters) == (slice_bytes, parts, clusters)
    assert 1 << found.l1_shift == table_bytes // 8 << cluster_bits
    assert 1 << found.slice_shift == slice_bytes // 8 << cluster_bits


def test_where_clusters_end_and_begin() -> None:
    assert geometry(12, 4096).host_limit(10000) == geometry(12, 4096).end_of(10000) == 8192
    assert geometry(12, 4096, whole=False).host_limit(10000) == 10000
    assert geometry(12, 4096, whole=False).end_of(10000) == 12288


@pytest.mark.parametrize("cluster_bits", range(9, 17))
def test_compressed_range(cluster_bits: int) -> None:
    length, offset = (1 << cluster_bits) - 3, (1 << 63 - cluster_bits) - 5
    entry = 1 << 63 | length << 63 - cluster_bits | offset
    assert geometry(cluster_bits, 4096).compressed_range(entry) == (offset, length)
