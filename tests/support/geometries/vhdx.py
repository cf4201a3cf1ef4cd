"""VHDX: dynamic, fixed and differencing images, block and sector sizes, and a log that is still to be replayed."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from nbdserve.block.node import Node
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.create import create_vhdx
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.log import ENTRY_SIGNATURE, PAGE
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.support.geometries.geometry import Contents, Field, Geometry, Kit
from tests.support.geometries.making import apart
from tests.support.recording import ByteStorage

_LOG_END = 2 * MIB
"""Of images with a log of the default size."""


def _by_dissect(path: Path) -> bytes:
    """The content as dissect.hypervisor reads it. It does not know the log, so that is replayed first."""
    from dissect.hypervisor.disk.vhdx import VHDX  # noqa: PLC0415 - installed with the tests' dependencies only

    apart(_replay(path))
    disk = VHDX(path)
    disk.seek(0)
    content: bytes = disk.read(disk.size)
    return content


async def _replay(path: Path) -> None:
    storage = await FileStorage.open(str(path))
    try:
        driver = await VhdxDriver.open(storage, {}, read_only=True)
        if driver.structure.overlay is not None:
            await driver.check(repair_errors=True)
    finally:
        await storage.close()


def _with_log(source: Path, path: Path) -> None:
    """An image that was not closed: its last changes are in the log alone."""
    apart(_leave(source.read_bytes(), path))


def _with_4k_sectors(source: Path, path: Path) -> None:
    apart(_leave(source.read_bytes(), path, sector_size=4096, closed=True))


async def _leave(content: bytes, path: Path, *, sector_size: int = 512, closed: bool = False) -> None:
    storage = ByteStorage(b"", str(path))
    await create_vhdx(storage, len(content), {"block_size": "1M"}, sector_size=sector_size)
    bat = bytes(storage.content[2 * MIB : 3 * MIB])
    driver = await VhdxDriver.open(storage, {}, read_only=False)
    node = Node([driver])
    half = len(content) // 2
    for start, end in ((0, half), (half, len(content))):
        for at in range(start, end, 64 * KIB):
            piece = content[at : min(at + 64 * KIB, end)]
            if any(piece):
                await node.write(at, piece)
        await node.flush()
    if closed:
        await node.close()
    else:
        last = random.Random(len(content)).randrange(2)
        storage.content[2 * MIB + last * 8 :][:8] = bat[last * 8 :][:8]
    path.write_bytes(storage.content)


def seal(contents: Contents) -> None:
    """The checksums of headers, region tables and log entries."""
    data = contents[0]
    places = [(offset, layout.HEADER_LENGTH) for offset in layout.HEADER_OFFSETS]
    places += [(offset, layout.REGION_TABLE_LENGTH) for offset in layout.REGION_TABLE_OFFSETS]
    for at in range(MIB, min(len(data), _LOG_END), PAGE):
        if data[at : at + 4] == ENTRY_SIGNATURE and at + PAGE <= len(data):
            length = struct.unpack_from("<I", data, at + 8)[0]
            if length % PAGE == 0 and at + length <= _LOG_END:
                places.append((at, length))
    for at, length in places:
        if 8 <= length <= len(data) - at:
            data[at : at + length] = layout.sealed(data[at : at + length])


def _header(number: int) -> list[Field]:
    at = layout.HEADER_OFFSETS[number]
    places = (
        ("signature", 0, 4),
        ("checksum", 4, 4),
        ("sequence_number", 8, 8),
        ("file_write_guid", 16, 8),
        ("data_write_guid", 32, 8),
        ("log_guid", 48, 8),
        ("log_version", 64, 2),
        ("version", 66, 2),
        ("log_length", 68, 4),
        ("log_offset", 72, 8),
    )
    return [Field(f"header {number + 1} {name}", at + offset, size) for name, offset, size in places]


def _region_table(number: int) -> list[Field]:
    at = layout.REGION_TABLE_OFFSETS[number]
    table = f"regions {number + 1}"
    fields = [Field(f"{table} signature", at, 4), Field(f"{table} count", at + 8, 4)]
    for entry in range(3):
        start = at + 16 + 32 * entry
        for name, offset, size in (("guid", 0, 8), ("file_offset", 16, 8), ("length", 24, 4), ("required", 28, 4)):
            fields.append(Field(f"{table} entry {entry} {name}", start + offset, size))
    return fields


def _metadata(at: int) -> list[Field]:
    """The region begins at ``at``: that is where images with a log of 1 MiB and a BAT of 1 MiB have it."""
    fields = [Field("metadata signature", at, 8), Field("metadata count", at + 10, 2)]
    for entry in range(6):
        start = at + 32 + 32 * entry
        for name, offset, size in (("item_id", 0, 8), ("offset", 16, 4), ("length", 20, 4), ("flags", 24, 4)):
            fields.append(Field(f"metadata entry {entry} {name}", start + offset, size))
    items = at + layout.METADATA_TABLE_LENGTH
    for name, offset, size in (
        ("block_size", 0, 4),
        ("flags", 4, 4),
        ("virtual_disk_size", 8, 8),
        ("virtual_disk_id", 16, 8),
        ("logical_sector_size", 32, 4),
        ("physical_sector_size", 36, 4),
        ("locator type", 40, 8),
        ("locator count", 58, 2),
        ("locator key_offset", 60, 4),
        ("locator value_offset", 64, 4),
        ("locator key_length", 68, 2),
        ("locator value_length", 70, 2),
    ):
        fields.append(Field(name, items + offset, size))
    return fields


def _log_and_bat() -> list[Field]:
    places = (
        ("signature", 0, 4),
        ("entry_length", 8, 4),
        ("tail", 12, 4),
        ("sequence_number", 16, 8),
        ("descriptor_count", 24, 4),
        ("flushed_file_offset", 48, 8),
        ("last_file_offset", 56, 8),
        ("descriptor signature", 64, 4),
        ("descriptor leading", 72, 8),
        ("descriptor file_offset", 80, 8),
        ("descriptor sequence_number", 88, 8),
        ("data signature", PAGE, 4),
        ("data sequence_high", PAGE + 4, 4),
    )
    fields = [Field(f"log {name}", MIB + offset, size) for name, offset, size in places]
    return fields + [Field(f"bat {index}", 2 * MIB + 8 * index, 8) for index in (0, 1, 2, 4096, 8192)]


KIT = Kit(
    "vhdx",
    (
        Geometry("vhdx-1m", 3 * MIB, "vhdx", options="block_size=1M"),
        Geometry("vhdx-tiny", 512, "vhdx", options="block_size=1M", maker="ours"),
        Geometry("vhdx-undefined", 3 * MIB + 512 * 3, "vhdx", options="block_size=1M,block_state_zero=off", own=True),
        Geometry("vhdx-ours", 4 * MIB, "vhdx", options="block_size=2M", maker="ours", own=True, fill="ours"),
        Geometry("vhdx-fixed", 2 * MIB + 512, "vhdx", options="subformat=fixed,block_size=1M", own=True),
        Geometry(
            "vhdx-diff",
            3 * MIB,
            "vhdx",
            options="block_size=1M",
            base="vhdx",
            base_size=5 * MIB,
            base_options="block_size=16M",
            maker="ours",
            stock="",
            reader=_by_dissect,
        ),
        Geometry(
            "vhdx-diff-short",
            3 * MIB + 512 * 5,
            "vhdx",
            options="block_size=2M",
            base="vhdx",
            base_size=2 * MIB + 512,
            base_options="block_size=1M",
            maker="ours",
            fill="ours",
            own=True,
            stock="",
        ),
    ),
    (
        Geometry("vhdx-8m", 40 * MIB + 512, "vhdx", own=True),
        Geometry("vhdx-256m", 20 * MIB, "vhdx", options="block_size=256M,log_size=3M", maker="ours"),
        Geometry(
            "vhdx-diff-8m",
            20 * MIB,
            "vhdx",
            options="block_size=8M",
            base="vhdx",
            base_size=20 * MIB,
            base_options="block_size=32M",
            maker="ours",
            fill="ours",
            own=True,
            stock="",
            reader=_by_dissect,
        ),
    ),
    (
        Geometry("vhdx-log", 3 * MIB, "vhdx", own=True, make_from=_with_log, stock=""),
        Geometry("vhdx-4k", 3 * MIB, "vhdx", own=True, make_from=_with_4k_sectors, stock="", reader=_by_dissect),
    ),
    stock_check=True,
    crash_codes=(0, 1),  # 1: there is a log, which it refuses to look past; repairing replays it and checks then
    crash_repair=True,
    fields=(
        Field("file signature", 0, 8),
        *_header(0),
        *_header(1),
        *_region_table(0),
        *_region_table(1),
        *_metadata(3 * MIB),
        *_log_and_bat(),
    ),
    seal=seal,
)
