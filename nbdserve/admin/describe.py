"""Nodes as ``query-block`` and its like show them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ConfigDict

from nbdserve.admin.nodes import NodeEntry, NodeTable
from nbdserve.admin.schema import Result, qmp_name
from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.description import image_info
from nbdserve.formats.base import FormatDriver
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up


class CacheInfo(Result):
    """BlockdevCacheInfo."""

    writeback: bool = True
    direct: bool
    no_flush: bool


class DirtyInfo(Result):
    """BlockDirtyInfo: a dirty bitmap."""

    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | None = None


def _device_member(name: str) -> str:
    return name if name.startswith(("backing_", "detect_", "write_", "bps", "iops")) else qmp_name(name)


class BlockDeviceInfo(Result):
    """A node. QEMU spells some of its members with underscores."""

    model_config = ConfigDict(alias_generator=_device_member)

    file: str
    node_name: str
    ro: bool
    drv: str
    backing_file: str | None = None
    backing_file_depth: int
    encrypted: bool
    detect_zeroes: str
    bps: int = 0
    bps_rd: int = 0
    bps_wr: int = 0
    iops: int = 0
    iops_rd: int = 0
    iops_wr: int = 0
    write_threshold: int = 0
    cache: CacheInfo
    image: dict[str, Any]
    dirty_bitmaps: list[DirtyInfo] | None = None


class BlockInfo(Result):
    """A device with a node in it."""

    device: str = ""
    qdev: str
    type: str = "unknown"
    removable: bool = False
    locked: bool = False
    io_status: str = "ok"
    inserted: BlockDeviceInfo


def device_info(entry: NodeEntry, bitmaps: Iterable[DirtyInfo] = (), *, flat: bool = False) -> BlockDeviceInfo:
    """The node ``entry``; ``flat``: without the images below it."""
    chain = entry.node.layers[:1] if flat else entry.node.layers
    info = _layer_info(entry, chain, len(entry.node.layers) - 1, entry.name)
    info.drv = entry.driver
    info.image["format"] = entry.driver
    info.ro = entry.node.read_only
    info.detect_zeroes = entry.node.detect_zeroes
    info.dirty_bitmaps = list(bitmaps) or None
    return info


def dirty_info(bitmap: DirtyBitmap) -> DirtyInfo:
    """A bitmap."""
    return DirtyInfo(
        name=bitmap.name,
        count=bitmap.count(),
        granularity=bitmap.granularity,
        recording=bitmap.recording,
        busy=bitmap.busy,
        persistent=bitmap.persistent,
        inconsistent=bitmap.inconsistent or None,
    )


def part_infos(nodes: NodeTable, entry: NodeEntry, *, flat: bool = False) -> list[BlockDeviceInfo]:
    """The layers below the top one, and the files."""
    infos: list[BlockDeviceInfo] = []
    layers = entry.layers
    for name, part in nodes.parts(entry):
        if isinstance(part, FormatDriver):
            index = layers.index(part)
            chain = layers[index : index + 1] if flat else layers[index:]
            infos.append(_layer_info(entry, chain, len(layers) - 1 - index, name))
        elif entry.driver not in ("file", "host_device"):
            infos.append(_file_info(entry, part, name))
    return infos


def _layer_info(entry: NodeEntry, chain: list[FormatDriver], depth: int, name: str) -> BlockDeviceInfo:
    top = chain[0]
    image = _image(chain)
    return BlockDeviceInfo(
        file=top.path,
        node_name=name,
        ro=top.read_only,
        drv=top.name,
        backing_file=image.get("full-backing-filename") if depth else None,
        backing_file_depth=depth,
        encrypted=bool(image.get("encrypted")),
        detect_zeroes="off",
        cache=_cache_info(entry),
        image=image,
    )


def _image(chain: list[FormatDriver]) -> dict[str, Any]:
    layer = chain[0]
    files = dict.fromkeys((layer.storage, layer.data))
    sizes = [_allocated_size(file) for file in files]
    known = [size for size in sizes if size is not None]
    image = image_info(layer.path, layer.info(), sum(known) if len(known) == len(sizes) else None)
    if len(chain) > 1:
        image["backing-image"] = _image(chain[1:])
    return image


def _allocated_size(storage: Storage) -> int | None:
    try:
        return storage.allocated_size()
    except OSError:  # a layer that is being opened again has no file for a moment
        return None


def _file_info(entry: NodeEntry, storage: Storage, name: str) -> BlockDeviceInfo:
    image: dict[str, Any] = {
        "virtual-size": align_up(storage.size, SECTOR_SIZE),
        "filename": storage.path,
        "format": "file",
        "dirty-flag": False,
    }
    size = _allocated_size(storage)
    if size is not None:
        image["actual-size"] = size
    return BlockDeviceInfo(
        file=storage.path,
        node_name=name,
        ro=storage.read_only,
        drv="file",
        backing_file_depth=0,
        encrypted=False,
        detect_zeroes="off",
        cache=_cache_info(entry),
        image=image,
    )


def _cache_info(entry: NodeEntry) -> CacheInfo:
    return CacheInfo(direct=entry.cache in ("none", "directsync"), no_flush=entry.cache == "unsafe")
