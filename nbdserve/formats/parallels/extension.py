"""The Format Extension of a Parallels image: one cluster of features, of which dirty bitmaps are known.

A dirty bitmap is read, not kept: the first change of an image drops it, for it would be wrong from then on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import construct as c
import numpy as np

from nbdserve.errors import CorruptImageError
from nbdserve.formats.parallels.layout import Header
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, SECTOR_SIZE, div_ceil, is_power_of_two

_log: Final = logging.getLogger(__name__)

MAGIC: Final = 0xAB234CEF23DCEA87
FEATURE_END: Final = 0
FEATURE_DIRTY_BITMAP: Final = 0x20385FAE252CB34A
FLAG_NECESSARY: Final = 1
"""Who does not know the feature does not change the image."""
FLAG_TRANSIT: Final = 2
"""Who does not know the feature leaves it as it is."""

HEAD: Final[Any] = c.Struct("magic" / c.Int64ul, "checksum" / c.Bytes(16))
FEATURE: Final[Any] = c.Struct("magic" / c.Int64ul, "flags" / c.Int64ul, "data_size" / c.Int32ul, "unused" / c.Int32ul)
BITMAP: Final[Any] = c.Struct(
    "size_sectors" / c.Int64ul, "id" / c.Bytes(16), "granularity_sectors" / c.Int32ul, "l1_size" / c.Int32ul
)
MAX_CLUSTER: Final = 16 * MIB
"""The largest cluster looked at: it is read whole, for its checksum."""
MAX_FEATURES: Final = 1024
_ALL_ZERO: Final = 0
_ALL_ONE: Final = 1
_CHUNK: Final = MIB


@dataclass(frozen=True, slots=True)
class Feature:
    """A section of the extension."""

    magic: int
    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DirtyBitmap:
    """Which parts of the disk have changed since some backup."""

    id: UUID
    """As QEMU names it."""
    granularity: int
    """Bytes of the disk per bit, a power of two."""
    l1: tuple[int, ...]
    """One entry per cluster of the bitmap: 0 and 1 stand for a cluster of such bits, others are sector numbers."""


@dataclass(frozen=True, slots=True)
class Extension:
    """What an image's extension holds."""

    bitmaps: tuple[DirtyBitmap, ...] = ()
    unknown: tuple[Feature, ...] = ()

    @property
    def transit(self) -> tuple[Feature, ...]:
        """Unknown features that stay when the image is changed."""
        return tuple(feature for feature in self.unknown if feature.flags & FLAG_TRANSIT)

    @property
    def necessary(self) -> Feature | None:
        """An unknown feature that forbids changing the image."""
        return next((feature for feature in self.unknown if feature.flags & FLAG_NECESSARY), None)


async def read_extension(storage: Storage, header: Header) -> Extension:
    """The extension; an empty one if it is damaged, which is logged, for the disk is whole without it.

    CorruptImageError when it cannot be told what it demands.
    """
    offset, size = header.extension_offset, header.cluster_size
    if not offset:
        return Extension()
    if size > MAX_CLUSTER:
        raise CorruptImageError(
            storage.path,
            f"an extension in a cluster of more than {MAX_CLUSTER} bytes is not looked at",
            field="ext_off",
            value=offset // SECTOR_SIZE,
        )
    if offset < header.data_offset or (offset - header.data_offset) % size or offset + size > storage.size:
        return _damaged(storage, header, "there is no such cluster")
    try:
        return parse(memoryview(await storage.read(offset, size)), header)
    except ValueError as error:
        return _damaged(storage, header, str(error))


def _damaged(storage: Storage, header: Header, why: str) -> Extension:
    _log.warning(
        "%s: ext_off = %d: the Format Extension is damaged and ignored: %s",
        storage.path,
        header.extension_offset // SECTOR_SIZE,
        why,
    )
    return Extension()


def parse(cluster: bytes | memoryview, header: Header) -> Extension:
    """The features in the extension cluster. ValueError when it is damaged."""
    cluster = memoryview(cluster)
    head = HEAD.parse(cluster[: HEAD.sizeof()])
    if head.magic != MAGIC:
        raise ValueError(f"wrong magic {head.magic:#x}")
    if hashlib.md5(cluster[HEAD.sizeof() :], usedforsecurity=False).digest() != head.checksum:
        raise ValueError("wrong checksum")
    bitmaps: list[DirtyBitmap] = []
    unknown: list[Feature] = []
    at = HEAD.sizeof()
    while True:
        if at + FEATURE.sizeof() > len(cluster):
            raise ValueError("no end of features")
        fields = FEATURE.parse(cluster[at : at + FEATURE.sizeof()])
        at += FEATURE.sizeof()
        if fields.magic == FEATURE_END:
            return Extension(tuple(bitmaps), tuple(unknown))
        if len(bitmaps) + len(unknown) == MAX_FEATURES:
            raise ValueError(f"more than {MAX_FEATURES} features")
        if fields.data_size > len(cluster) - at:
            raise ValueError(f"a feature of {fields.data_size} bytes reaches past the cluster")
        data = bytes(cluster[at : at + fields.data_size])
        at += fields.data_size + -fields.data_size % 8
        if fields.magic == FEATURE_DIRTY_BITMAP:
            bitmaps.append(_parse_bitmap(data, header))
        else:
            unknown.append(Feature(fields.magic, fields.flags, data))


def _parse_bitmap(data: bytes, header: Header) -> DirtyBitmap:
    if len(data) < BITMAP.sizeof():
        raise ValueError(f"a dirty bitmap of {len(data)} bytes")
    fields = BITMAP.parse(data)
    if fields.size_sectors * SECTOR_SIZE != header.size:
        raise ValueError(f"a dirty bitmap of a disk of {fields.size_sectors} sectors")
    if not is_power_of_two(fields.granularity_sectors):
        raise ValueError(f"a dirty bitmap of granularity {fields.granularity_sectors}")
    bits = div_ceil(fields.size_sectors, fields.granularity_sectors)
    if fields.l1_size != div_ceil(div_ceil(bits, 8), header.cluster_size):
        raise ValueError(f"a dirty bitmap with {fields.l1_size} clusters for {bits} bits")
    table = data[BITMAP.sizeof() :]
    if len(table) < fields.l1_size * 8:
        raise ValueError("a dirty bitmap with a part of its table")
    l1 = np.frombuffer(table, "<u8", fields.l1_size).tolist()
    return DirtyBitmap(UUID(bytes=fields.id), fields.granularity_sectors * SECTOR_SIZE, tuple(l1))


def build(features: tuple[Feature, ...], cluster_size: int) -> bytes:
    """The extension cluster that holds ``features``. ValueError when they do not fit."""
    body = b"".join(
        FEATURE.build({"magic": f.magic, "flags": f.flags, "data_size": len(f.data), "unused": 0})
        + f.data
        + bytes(-len(f.data) % 8)
        for f in features
    ) + bytes(FEATURE.sizeof())
    room = cluster_size - HEAD.sizeof()
    if len(body) > room:
        raise ValueError(f"{len(body)} bytes of features do not fit into a cluster of {cluster_size}")
    body = body.ljust(room, b"\0")
    checksum = hashlib.md5(body, usedforsecurity=False).digest()
    head: bytes = HEAD.build({"magic": MAGIC, "checksum": checksum})
    return head + body


def build_bitmap(bitmap: DirtyBitmap, header: Header) -> Feature:
    """The feature that describes ``bitmap``."""
    data = BITMAP.build(
        {
            "size_sectors": header.size // SECTOR_SIZE,
            "id": bitmap.id.bytes,
            "granularity_sectors": bitmap.granularity // SECTOR_SIZE,
            "l1_size": len(bitmap.l1),
        }
    )
    return Feature(FEATURE_DIRTY_BITMAP, 0, data + np.array(bitmap.l1, "<u8").tobytes())


async def dirty_ranges(storage: Storage, header: Header, bitmap: DirtyBitmap) -> AsyncIterator[tuple[int, int]]:
    """``(offset, length)`` of what ``bitmap`` says has changed, ascending, neighbours joined.

    CorruptImageError for an entry that refers to no cluster.
    """
    bits = div_ceil(header.size, bitmap.granularity)
    begun = -1
    bit = 0
    while bit < bits:
        index, inside = divmod(bit // 8, header.cluster_size)
        count = min(bits - bit, (header.cluster_size - inside) * 8)
        entry = bitmap.l1[index]
        if entry in (_ALL_ZERO, _ALL_ONE):
            edges = [bit] if (entry == _ALL_ONE) != (begun >= 0) else []
        else:
            host_offset = entry * SECTOR_SIZE
            if (
                host_offset < header.data_offset
                or (host_offset - header.data_offset) % header.cluster_size
                or host_offset >= storage.size
            ):
                raise CorruptImageError(
                    storage.path, "there is no such cluster", field="dirty bitmap L1 entry", value=entry
                )
            count = min(count, _CHUNK * 8)
            stored = await storage.read(host_offset + inside, div_ceil(count, 8))
            values = np.unpackbits(np.frombuffer(stored, np.uint8), count=count, bitorder="little").astype(np.int8)
            edges = (np.flatnonzero(np.diff(values, prepend=np.int8(begun >= 0))) + bit).tolist()
        for edge in edges:
            if begun < 0:
                begun = edge
            else:
                yield _range(begun, edge, bitmap, header)
                begun = -1
        bit += count
    if begun >= 0:
        yield _range(begun, bits, bitmap, header)


def _range(first: int, end: int, bitmap: DirtyBitmap, header: Header) -> tuple[int, int]:
    offset = first * bitmap.granularity
    return offset, min(end * bitmap.granularity, header.size) - offset
