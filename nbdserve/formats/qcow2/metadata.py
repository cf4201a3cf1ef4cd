"""Which host clusters hold the image's own metadata, so that no guest data is ever written there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nbdserve.errors import CorruptImageError
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import AUTOCLEAR_BITMAPS, COPIED, OFFSET_MASK
from nbdserve.formats.qcow2.snapshots import Snapshot
from nbdserve.formats.tables import Table, Words
from nbdserve.units import div_ceil


def metadata_clusters(
    header: Header,
    l1: Table,
    refcount_table: Table,
    snapshots: Sequence[Snapshot],
    snapshot_table_bytes: int,
    path: str,
) -> set[int]:
    """The clusters of header, tables, refcount blocks, snapshot table, snapshots' L1 tables, LUKS header and bitmap
    directory.

    CorruptImageError when two of them share a cluster: writing one would destroy the other. (L2 tables may be shared by
    L1 entries that say so, lacking COPIED; entries that point nowhere inside a file are left to those who follow them.)
    """
    bits = header.cluster_bits
    regions = [
        ("header", 0, 1),
        ("L1 table", header.l1_offset, header.l1_entries * 8),
        ("refcount table", header.refcount_table_offset, header.refcount_table_clusters << bits),
        ("snapshot table", header.snapshots_offset, snapshot_table_bytes),
        *((f"L1 table of snapshot {s.id!r}", s.l1_offset, s.l1_entries * 8) for s in snapshots),
    ]
    if header.luks_area is not None:
        regions.append(("the LUKS header", *header.luks_area))
    bitmaps = header.bitmaps
    if bitmaps is not None and header.autoclear & AUTOCLEAR_BITMAPS:
        regions.append(("bitmap directory", bitmaps.directory_offset, min(bitmaps.directory_size, 64 << 20)))
    clusters: set[int] = set()
    for what, offset, length in regions:
        first = offset >> bits
        covered = range(first, first + div_ceil(length, 1 << bits))
        if not clusters.isdisjoint(covered):
            raise _overlap(path, what, offset)
        clusters.update(covered)
    blocks = _offsets(refcount_table.words, header.cluster_size)
    own = _offsets(l1.words[l1.words & np.uint64(COPIED) != 0], header.cluster_size)
    for what, offsets in (("refcount block", blocks), ("L2 table", own)):
        numbers = (offsets >> np.uint64(bits)).tolist()
        before = len(clusters)
        clusters.update(numbers)
        if len(clusters) != before + len(numbers):
            known = clusters.difference(numbers)
            twice = next((n for i, n in enumerate(numbers) if n in known or n in numbers[:i]), numbers[0])
            raise _overlap(path, what, twice << bits)
    shared = _offsets(l1.words[l1.words & np.uint64(COPIED) == 0], header.cluster_size)
    numbers = (shared >> np.uint64(bits)).tolist()
    met = clusters.intersection(numbers)
    if met:
        raise _overlap(path, "L2 table", min(met) << bits)
    clusters.update(numbers)
    return clusters


def _offsets(words: Words, cluster_size: int) -> Words:
    """The aligned, nonzero host offsets in ``words``."""
    offsets = words & np.uint64(OFFSET_MASK)
    found: Words = offsets[(offsets != 0) & (offsets % np.uint64(cluster_size) == 0)]
    return found


def _overlap(path: str, what: str, offset: int) -> CorruptImageError:
    return CorruptImageError(
        path, "it overlaps other metadata", field=what, value=offset, hint="it can be read; image check -r all"
    )
