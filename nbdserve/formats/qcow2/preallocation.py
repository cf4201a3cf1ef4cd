"""Whether an image was created with preallocated metadata, so that its data clusters may still be holes of the file."""

from __future__ import annotations

import numpy as np

from nbdserve.formats.qcow2.check_walk import WINDOW_CLUSTERS, DiskRefcounts, read_words
from nbdserve.formats.qcow2.header import Header
from nbdserve.storage.base import Storage
from nbdserve.units import div_ceil


async def metadata_preallocated(storage: Storage, header: Header) -> bool:
    """Whether clearly more clusters are in use than the file has disk space for, by QEMU's rule: one ninth, and two.

    Only of such an image the holes of the file are worth asking for. OSError.
    """
    allocated = storage.allocated_size()
    if allocated is None:
        return False
    on_disk = allocated // header.cluster_size
    threshold = max(on_disk * 10 // 9, on_disk + 2)
    clusters = div_ceil(storage.size, header.cluster_size)
    if clusters < threshold:
        return False
    table = await read_words(storage, header.refcount_table_offset, header.refcount_table_entries)
    refcounts = DiskRefcounts(storage, header, table)
    used = 0
    for first in range(0, min(clusters, len(table) * header.refcount_block_entries), WINDOW_CLUSTERS):
        counts, _ = await refcounts.read(first, min(WINDOW_CLUSTERS, clusters - first))
        used += int(np.count_nonzero(counts))
        if used >= threshold:
            return True
    return False
