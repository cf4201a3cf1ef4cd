"""raw-cow: clusters of any size over backing files longer and shorter than the disk, which ends anywhere in a cluster.

No stock tool knows the format; the other reader here is 20 lines that share nothing with the driver.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

from nbdserve.formats.raw_cow.layout import CHECKSUM_AT, HEADER_SIZE, header_checksum
from nbdserve.units import KIB, MIB, SECTOR_SIZE
from tests.support import images
from tests.support.geometries.geometry import Contents, Field, Geometry, Kit


def read(path: Path) -> bytes:
    """The disk, by the places of the fields and the bits."""
    image = path.read_bytes()
    _, _, backing, raw_name, _, size, _ = struct.unpack_from(">4sI1024s1024siQI", image)
    backing_format = image[2096:2128].rstrip(b"\0").decode()
    cluster, bitmap, limit = struct.unpack_from(">IQQ", image, 2160)
    content = bytearray()
    if backing := backing.rstrip(b"\0").decode():
        with tempfile.TemporaryDirectory(dir=images.SCRATCH) as scratch:
            content += images.raw_content(path.parent / backing, backing_format, Path(scratch))[: min(size, limit)]
    content += bytes(size - len(content))
    raw = (path.parent / raw_name.rstrip(b"\0").decode()).read_bytes().ljust(size, b"\0")
    for index in range(-(-size // cluster)):
        if image[bitmap + index // 8] & 1 << index % 8:
            start, end = index * cluster, min(size, (index + 1) * cluster)
            content[start:end] = raw[start:end]
    return bytes(content)


def _geometry(
    name: str, size: int, cluster_size: str, *, base: str = "", base_size: int = 0, own: bool = False
) -> Geometry:
    return Geometry(
        f"raw-cow-{name}",
        size,
        "raw-cow",
        options=f"raw_file=image.img,cluster_size={cluster_size}",
        base=base,
        base_size=base_size,
        own=own,
        maker="ours",
        fill="ours",
        stock="",
        reader=read,
    )


def _seal(contents: Contents) -> None:
    image = contents[0]
    if len(image) >= HEADER_SIZE:
        image[CHECKSUM_AT : CHECKSUM_AT + 4] = header_checksum(bytes(image[:HEADER_SIZE])).to_bytes(4, "big")


KIT = Kit(
    "raw-cow",
    (
        _geometry("sector", SECTOR_SIZE, "64k"),
        _geometry("512", 768 * KIB, "512"),
        _geometry("512-backing", 512 * KIB, "512", base="raw", base_size=384 * KIB, own=True),
        _geometry("4k-backing", 2 * MIB + 512, "4k", base="qcow2", base_size=3 * MIB),
        _geometry("4k-own", 2 * MIB, "4k", own=True),
        _geometry("64k-long-base", 3 * MIB + 1536, "64k", base="raw", base_size=4 * MIB, own=True),
        _geometry("64k-short-base", 3 * MIB, "64k", base="qcow2", base_size=1 * MIB + 512),
    ),
    more=(
        _geometry("2m-backing", 9 * MIB + 512, "2M", base="qcow2", base_size=7 * MIB, own=True),
        _geometry("64k", 17 * MIB, "64k"),
    ),
    fields=tuple(
        Field(name, offset, size, "big")
        for name, offset, size in (
            ("magic", 0, 4),
            ("version", 4, 4),
            ("backing_file", 8, 8),
            ("raw_file", 1032, 8),
            ("mtime", 2056, 4),
            ("size", 2060, 8),
            ("sectorsize", 2068, 4),
            ("incompatible_features", 2072, 8),
            ("compatible_features", 2080, 8),
            ("autoclear_features", 2088, 8),
            ("backing_format", 2096, 8),
            ("raw_format", 2128, 8),
            ("cluster_size", 2160, 4),
            ("bitmap_offset", 2164, 8),
            ("backing_limit", 2172, 8),
            ("bitmap", 4096, 8),
        )
    ),
    seal=_seal,
    create=(
        "raw_file=image.img",
        "raw_file=image.img,cluster_size=512,backing_file=base,backing_fmt=raw",
        "raw_file=image.img,cluster_size=2M",
    ),
)
