"""Parallels images. QEMU makes none with entries in sectors (v1), but reads and writes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from uuid import UUID

from nbdserve.formats.parallels import extension
from nbdserve.formats.parallels.extension import DirtyBitmap
from nbdserve.formats.parallels.layout import BAT_OFFSET, MAGIC_V1, Header, plan
from nbdserve.units import KIB, MIB
from tests.support.geometries.geometry import Field, Geometry, Kit


def _fill(path: Path, header: Header, source: Path, clusters: bytes = b"") -> None:
    """Header, table, ``clusters``, and those of ``source`` that hold anything."""
    content, size = source.read_bytes(), header.cluster_size
    file = bytearray(header.build().ljust(header.data_offset, b"\0") + clusters)
    for block in range(header.bat_entries):
        data = content[block * size : (block + 1) * size]
        if any(data):
            file[BAT_OFFSET + block * 4 : BAT_OFFSET + block * 4 + 4] = (len(file) // header.entry_scale).to_bytes(
                4, "little"
            )
            file += data.ljust(size, b"\0")
    path.write_bytes(file)


def _v1(source: Path, path: Path) -> None:
    """63 sectors to a cluster, data right behind the table, as old versions made them."""
    header = dataclasses.replace(plan(source.stat().st_size, cluster_size=63 * 512), magic=MAGIC_V1)
    _fill(path, dataclasses.replace(header, data_offset=-(-header.bat_end // 512) * 512), source)


def _with_bitmap(source: Path, path: Path) -> None:
    header = plan(source.stat().st_size, cluster_size=64 * KIB)
    header = dataclasses.replace(header, extension_offset=header.data_offset)
    bitmap = DirtyBitmap(UUID(int=1), 64 * KIB, ((header.data_offset + header.cluster_size) // 512,))
    body = extension.build((extension.build_bitmap(bitmap, header),), header.cluster_size)
    _fill(path, header, source, body + b"\xa5\x0f".ljust(header.cluster_size, b"\0"))


KIT = Kit(
    "parallels",
    geometries=(
        Geometry("parallels-64k", 2 * MIB, "parallels", "cluster_size=64k"),
        Geometry("parallels-4k-odd", 400 * KIB + 512, "parallels", "cluster_size=4k", maker="ours"),
        Geometry("parallels-512", 50 * KIB, "parallels", "cluster_size=512", maker="ours"),
        Geometry("parallels-own", 4 * MIB, "parallels", own=True),
        Geometry("parallels-tiny", 1536, "parallels", maker="ours"),
        Geometry("parallels-63", 1 * MIB, "parallels", "cluster_size=32256"),
        Geometry("parallels-v1", 1 * MIB, "parallels", own=True, make_from=_v1),
        Geometry("parallels-bitmap", 1 * MIB, "parallels", own=True, make_from=_with_bitmap),
    ),
    more=(
        Geometry("parallels-1m", 24 * MIB + 512, "parallels", own=True),
        Geometry("parallels-252k", 9 * MIB, "parallels", "cluster_size=258048", maker="ours"),
    ),
    stock_check=True,
    crash_repair=True,
    crash_codes=(0, 2, 3),
    crash_marks=1,
    fields=(
        Field("magic", 0, 8),
        Field("version", 16, 4),
        Field("heads", 20, 4),
        Field("cylinders", 24, 4),
        Field("tracks", 28, 4),
        Field("bat_entries", 32, 4),
        Field("nb_sectors", 36, 8),
        Field("in_use", 44, 4),
        Field("data_off", 48, 4),
        Field("flags", 52, 4),
        Field("ext_off", 56, 8),
        Field("BAT entry 0", 64, 4),
        Field("BAT entry 1", 68, 4),
    ),
)
