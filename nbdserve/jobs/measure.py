"""How large the file of a new image becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nbdserve.block.node import Node
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.qcow2.bitmap_directory import BitmapEntry
from nbdserve.formats.qcow2.create import parse_options, plan_image, virtual_size
from nbdserve.jobs.stretches import What, stretches
from nbdserve.units import align_up, div_ceil

_OTHER_FILES: Final = frozenset({"backing_file", "backing_fmt", "data_file", "data_file_raw"})
"""Options that name the other files of an image: no room is needed for the names."""


def measurable(driver: type[FormatDriver]) -> bool:
    """Those qemu-img measures, and no encrypted ones."""
    return driver.name in ("raw", "qcow2")


def measure_empty(driver: type[FormatDriver], size: int, options: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of a new image of ``size`` that nothing is written to, and of one that is full. ConfigError."""
    return _sizes(driver, size, options, 0)


async def measure_node(driver: type[FormatDriver], node: Node, options: Mapping[str, str]) -> tuple[int, int]:
    """The same for an image with the content of ``node``: what holds data in it takes room."""
    if driver.name == "raw":
        return _sizes(driver, node.size, options, 0)
    cluster = 1 << parse_options(options).cluster_bits
    used, end = 0, 0
    if node.size:
        async for offset, length, what in stretches(node, 0, node.size):
            if what == What.DATA:
                first = max(end, offset - offset % cluster)
                end = align_up(offset + length, cluster)
                used += max(0, end - first)
    return _sizes(driver, node.size, options, used)


def _sizes(driver: type[FormatDriver], size: int, options: Mapping[str, str], used: int) -> tuple[int, int]:
    driver.validate_create(size, options)
    if driver.name == "raw":
        return size, size
    full, disk = _qcow2_size(virtual_size(size), options)
    if parse_options(options).preallocation in ("falloc", "full") or "backing_file" in options:
        used = disk  # what the source has in common with another backing file is not known
    return full - disk + used, full


def _qcow2_size(size: int, options: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of a qcow2 image all of whose clusters are allocated, and of these clusters, also in a data file.

    An image with preallocated metadata has the same tables; its encryption header is a few clusters more.
    """
    alone = {name: value for name, value in options.items() if name not in _OTHER_FILES}
    _, plan, _ = plan_image(size, alone | {"preallocation": "metadata"})
    cluster = 1 << plan.cluster_bits
    return plan.end_offset, div_ceil(size, cluster) * cluster


async def measure_bitmaps(driver: type[FormatDriver], node: Node, options: Mapping[str, str]) -> int | None:
    """Bytes that the stored bitmaps of ``node`` take in the new image; None where there can be none."""
    bitmaps = await node.top.stored_bitmaps()
    if bitmaps is None or driver.name != "qcow2" or (parsed := parse_options(options)).version < 3:
        return None
    cluster, size, directory = 1 << parsed.cluster_bits, 0, b""
    for bitmap in bitmaps:
        clusters = div_ceil(div_ceil(div_ceil(node.size, bitmap.granularity), 8), cluster)
        size += clusters * cluster + align_up(clusters * 8, cluster)
        directory += BitmapEntry(bitmap.name, 0, 0, 0, clusters).build()
    return size + align_up(len(directory), cluster)
