"""What the VMDK tests share: images made by stock tools or by hand, and opening them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.formats.vmdk import layout
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, SECTOR_SIZE
from tests.support import images

GRAIN = 64 * KIB


def stock(path: Path, size: int | None, options: str = "", backing: str = "") -> Path:
    """An image made by qemu-img."""
    images.create(path, size, fmt="vmdk", options=options, backing=(backing, "vmdk") if backing else None)
    return path


def qemu_io(path: Path, *commands: str) -> None:
    """Run qemu-io commands on an image."""
    images.qemu_io(path, "vmdk", commands)


def content(path: Path) -> bytes:
    """The guest content as qemu-img reads it."""
    return images.raw_content(path, "vmdk", path.parent)


async def node_of(path: Path, *, read_only: bool = False, **how: Any) -> Node:
    """The chain on ``path``."""
    return await open_image(ImageSpec(str(path), "vmdk", read_only=read_only, **how))


async def driver_of(path: Path, *, read_only: bool = False, **options: Any) -> VmdkDriver:
    """The driver alone, with the files of its extents."""
    storage = await FileStorage.open(str(path), read_only=read_only)
    opened: list[FileStorage] = [storage]
    try:
        for companion in await VmdkDriver.companions(storage):
            name = str(path.parent / companion.name)
            opened.append(await FileStorage.open(name, read_only=read_only or companion.read_only))
        return await VmdkDriver.open(storage, {"companions": opened[1:], **options}, read_only=read_only)
    except BaseException:
        for file in opened:
            await file.close()
        raise


async def put(driver: VmdkDriver, offset: int, data: bytes) -> None:
    """Write whole grains, through the driver alone."""
    done = 0
    while done < len(data):
        at = offset + done
        found = driver.lookup_writable(at, len(data) - done)
        if found is None:
            await driver.load(at)
            continue
        kind, length, host_offset = found
        if kind == 0:
            await driver.data.write(host_offset, data[done : done + length])
        else:
            while (allocation := driver.allocate(at, length)) is None:
                await driver.prepare(at, length)
            length = min(length, allocation.length)
            await driver.data.write(allocation.host_offset, data[done : done + length])
            driver.publish(allocation)
        done += length


def tables(path: Path) -> tuple[list[int], list[int]]:
    """The entries of all grain tables of a hosted extent as they are on disk, and those of the redundant ones."""
    data = path.read_bytes()
    header = layout.parse_hosted(data[:SECTOR_SIZE], str(path), len(data))
    found = []
    for place in (header.directory_offset, header.redundant_offset):
        directory = struct.unpack_from(f"<{header.directory_entries}I", data, place)
        entries: list[int] = []
        for sector in directory:
            entries += struct.unpack_from(f"<{header.table_entries}I", data, sector * SECTOR_SIZE)
        found.append(entries)
    return found[0], found[1]


def patch(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def cowd(path: Path, grains: Sequence[bytes | None]) -> Path:
    """An ESX sparse image, by hand: descriptor ``path``, extent ``esx.vmdk`` with these grains of 512 bytes."""
    sectors = len(grains)
    first = 4 + 1 + layout.COWD_TABLE_ENTRIES * 4 // SECTOR_SIZE
    header = layout.COWD_HEADER.build(
        {
            "magic": layout.COWD,
            "version": 1,
            "flags": 3,
            "capacity": sectors,
            "grain_size": 1,
            "directory_offset": 4,
            "directory_entries": 1,
            "next_free": first,
        }
    )
    table, data = [], b""
    for grain in grains:
        table.append(0 if grain is None else first + len(data) // SECTOR_SIZE)
        data += grain or b""
    directory = struct.pack("<I", 5).ljust(SECTOR_SIZE, b"\0")
    stored = struct.pack(f"<{sectors}I", *table).ljust(layout.COWD_TABLE_ENTRIES * 4, b"\0")
    (path.parent / "esx.vmdk").write_bytes(header.ljust(4 * SECTOR_SIZE, b"\0") + directory + stored + data)
    return described(path, "vmfsSparse", f'RW {sectors} VMFSSPARSE "esx.vmdk"')


def sesparse(path: Path, grains: Sequence[bytes | int | None], **changes: int) -> Path:
    """A space-efficient image, by hand: grains of 4 KiB, None unallocated, or an int: the kind of a grain of zeroes."""
    fields = {
        "magic": layout.SESPARSE,
        "version": layout.SESPARSE_VERSION,
        "capacity": len(grains) * 8,
        "grain_size": 8,
        "table_size": 64,
        "flags": 0,
        "reserved": [0] * 4,
        "volatile_offset": 1,
        "volatile_size": 1,
        "journal_header_offset": 2,
        "journal_header_size": 2,
        "journal_offset": 2048,
        "journal_size": 2048,
        "directory_offset": 4,
        "directory_size": 1,
        "tables_offset": 8,
        "tables_size": 64 * 2,
        "free_bitmap_offset": 0,
        "free_bitmap_size": 0,
        "backmap_offset": 0,
        "backmap_size": 0,
        "grains_offset": 8 + 64 * 2,
        "grains_size": len(grains) * 8,
    }
    fields |= {name: value for name, value in changes.items() if name in fields}
    volatile = layout.SESPARSE_VOLATILE.build(
        {
            "magic": layout.SESPARSE_VOLATILE_MAGIC,
            "free_table": 1,
            "next_transaction": 0,
            "replay_journal": changes.get("replay_journal", 0),
        }
    )
    entries, data = [], b""
    for grain in grains:
        if isinstance(grain, bytes):
            number = len(data) // 4096
            entries.append(3 << 60 | (number & 0xFFF) << 48 | number >> 12)
            data += grain
        else:
            entries.append((grain or 0) << 60)
    # The table is the second of its area: an entry of the directory counts in tables.
    parts = [
        (0, layout.SESPARSE_HEADER.build(fields)),
        (1, volatile),
        (4, struct.pack("<Q", changes.get("directory_entry", 0x1000_0000 << 32 | 1))),
        (8 + 64, struct.pack(f"<{len(entries)}Q", *entries)),
        (8 + 128, data or bytes(4096)),
    ]
    with (path.parent / "se.vmdk").open("wb") as file:
        for sector, part in parts:
            file.seek(sector * SECTOR_SIZE)
            file.write(part)
    return described(path, "seSparse", f'RW {len(grains) * 8} SESPARSE "se.vmdk"')


def described(path: Path, create_type: str, *extents: str) -> Path:
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff"]
    path.write_text("\n".join([*lines, f'createType="{create_type}"', *extents, ""]))
    return path
