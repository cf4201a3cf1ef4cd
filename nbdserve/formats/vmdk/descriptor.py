"""The text descriptor of a VMDK image, both ways (VMware Virtual Disk Format 5.0, "The Descriptor File").

It is a file of its own, or stands in a sparse extent behind the header. It names the files that hold the data, and the
content ID that ties an image to its parent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from nbdserve.errors import ConfigError, CorruptImageError, UnsupportedImageError
from nbdserve.units import MIB, SECTOR_SIZE

SIGNATURE: Final = b"# Disk DescriptorFile"
MAX_BYTES: Final = MIB
"""Of a descriptor; QEMU reads no more."""
MAX_EXTENTS: Final = 4096
MAX_NAME: Final = 1023
"""Bytes of a file name."""
MAX_SECTORS: Final = 1 << 47
"""Of one extent, and of the offset of a flat one: 2^56 bytes."""
NO_PARENT: Final = 0xFFFF_FFFF
"""The parentCID of an image without a parent; also the CID of a descriptor that has none."""

FLAT_TYPES: Final = frozenset(("FLAT", "VMFS"))
SPARSE_TYPES: Final = frozenset(("SPARSE", "VMFSSPARSE", "SESPARSE"))
ZERO_TYPE: Final = "ZERO"
FILE_TYPES: Final = frozenset(
    ("monolithicFlat", "vmfs", "vmfsSparse", "seSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat")
)
"""The createTypes of descriptors that are files of their own."""

_KEY: Final = re.compile(rb"\w+")
_EXTENT: Final = re.compile(
    rb'\s*(?P<access>\w+)\s+(?P<sectors>\d{1,20})\s+(?P<type>\w+)(?:\s+"(?P<name>[^"]*)"(?:\s+(?P<offset>\d{1,20}))?.*)?\s*'
)
_ACCESS: Final = re.compile(rb"\s*(RW|RDONLY|NOACCESS)\b")
_CID: Final = re.compile(rb"^[ \t]*CID[ \t]*=[ \t]*([0-9a-fA-F]{1,8})(?![0-9a-zA-Z])", re.MULTILINE)
_CID_VALUE: Final = re.compile(rb"[0-9a-fA-F]{1,8}")


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One extent as the descriptor describes it."""

    access: str
    """``RW`` or ``RDONLY``."""
    size_sectors: int
    type: str
    name: str = ""
    """Of the file, decoded as UTF-8 with surrogateescape; empty for ZERO."""
    offset_sectors: int = 0
    """Where a flat extent begins in its file."""

    def text(self) -> str:
        """The line."""
        if self.type == ZERO_TYPE:
            return f"{self.access} {self.size_sectors} {self.type}"
        offset = f" {self.offset_sectors}" if self.type in FLAT_TYPES else ""
        return f'{self.access} {self.size_sectors} {self.type} "{self.name}"{offset}'


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says, checked against itself."""

    cid: int = NO_PARENT
    """Content ID: changed when an image is written, so that a child can tell that its parent has."""
    parent_cid: int = NO_PARENT
    create_type: str = ""
    parent_name: str | None = None
    """As stored, decoded as UTF-8 with surrogateescape."""
    extents: tuple[ExtentLine, ...] = ()
    cid_at: tuple[int, int] | None = None
    """``(offset, length)`` in bytes of the digits of the CID; None if the descriptor has none."""

    @property
    def shared_extent(self) -> ExtentLine | None:
        """An extent that lies, in part or as a whole, where another one does: writing to one changes the other."""
        placed = [line for line in self.extents if line.type != ZERO_TYPE]
        placed.sort(key=lambda line: (line.name, line.offset_sectors))
        for before, line in pairwise(placed):
            sparse = before.type in SPARSE_TYPES or line.type in SPARSE_TYPES  # such a one has the whole file
            if before.name == line.name and (
                sparse or line.offset_sectors < before.offset_sectors + before.size_sectors
            ):
                return line
        return None

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str) -> Descriptor:
        """The descriptor in ``data``, which ends at its first NUL byte. ImageError names the key and its value."""
        text = bytes(data).partition(b"\0")[0]
        if len(text) > MAX_BYTES:
            raise CorruptImageError(path, f"at most {MAX_BYTES} bytes", field="descriptor size", value=len(text))
        values: dict[bytes, bytes] = {}
        extents: list[ExtentLine] = []
        for line in text.splitlines():
            if _ACCESS.match(line):
                extents.append(_parse_extent(line, path))
                if len(extents) > MAX_EXTENTS:
                    raise UnsupportedImageError(path, f"more than {MAX_EXTENTS}", field="extents", value=len(extents))
                continue
            key, equals, value = line.partition(b"=")
            if equals and _KEY.fullmatch(key.strip()) is not None:
                values.setdefault(key.strip().lower(), value.strip())
        digits = _CID.search(text)
        return cls(
            cid=_content_id(values, "CID", path),
            parent_cid=_content_id(values, "parentCID", path),
            create_type=_unquoted(values.get(b"createtype", b"")),
            parent_name=_name(path, "parentFileNameHint", values.get(b"parentfilenamehint", b"")) or None,
            extents=tuple(extents),
            cid_at=None if digits is None else (digits.start(1), len(digits[1])),
        )


def _parse_extent(line: bytes, path: str) -> ExtentLine:
    shown = line.decode("utf-8", "replace")[:200]
    match = _EXTENT.fullmatch(line)
    if match is None:
        raise CorruptImageError(path, "not an extent description", field="extent", value=shown)
    kind, access = match["type"].decode(), match["access"].decode()
    if kind not in FLAT_TYPES | SPARSE_TYPES | {ZERO_TYPE}:
        raise UnsupportedImageError(path, f"extents of type {kind}", field="extent", value=shown)
    if access == "NOACCESS":
        raise UnsupportedImageError(path, "an extent that may not be accessed", field="extent", value=shown)
    sectors, offset = int(match["sectors"]), int(match["offset"] or 0)
    if not 0 < sectors <= MAX_SECTORS:
        raise CorruptImageError(path, f"the size must be 1 to {MAX_SECTORS} sectors", field="extent", value=shown)
    if kind == ZERO_TYPE:
        return ExtentLine(access, sectors, kind)
    if offset > MAX_SECTORS:
        raise CorruptImageError(path, f"the offset is limited to {MAX_SECTORS} sectors", field="extent", value=shown)
    if kind == "FLAT" and match["offset"] is None:
        raise CorruptImageError(path, "a flat extent needs an offset", field="extent", value=shown)
    if kind in SPARSE_TYPES and offset:
        raise CorruptImageError(path, "a sparse extent has no offset", field="extent", value=shown)
    name = _name(path, "extent", match["name"] or b"")
    if not name:
        raise CorruptImageError(path, "the extent names no file", field="extent", value=shown)
    return ExtentLine(access, sectors, kind, name, offset)


def _content_id(values: dict[bytes, bytes], key: str, path: str) -> int:
    value = values.get(key.lower().encode())
    if value is None:
        return NO_PARENT
    if _CID_VALUE.fullmatch(value) is None:
        shown = value.decode("utf-8", "replace")[:200]
        raise CorruptImageError(path, "must be one to eight hexadecimal digits", field=key, value=shown)
    return int(value, 16)


def _unquoted(value: bytes) -> str:
    return value.strip(b'"').decode("utf-8", "surrogateescape")[:MAX_NAME]


def _name(path: str, field: str, value: bytes) -> str:
    if len(value) > MAX_NAME + 2:
        raise CorruptImageError(path, f"a file name has at most {MAX_NAME} bytes", field=field, value=len(value))
    return _unquoted(value)


def with_other_cid(old: bytes, random_bits: int) -> bytes:
    """Digits for a new CID, as many as ``old`` has and not equal to it, so that they fit in its place.

    ``random_bits``: 32 of them. The result is never the value that stands for *no parent*.
    """
    width = len(old)
    limit = 1 << 4 * width
    value = random_bits % limit
    while value == int(old, 16) or value == NO_PARENT:
        value = (value + 1) % limit
    return f"{value:0{width}x}".encode()


def build_descriptor(
    *,
    cid: int,
    parent_cid: int,
    create_type: str,
    parent_name: str | None,
    extents: Sequence[ExtentLine],
    size: int,
    adapter_type: str,
    hw_version: str,
    tools_version: str,
) -> bytes:
    """The text of a new image of ``size`` bytes. ConfigError for names that it cannot hold."""
    for value in (parent_name or "", hw_version, tools_version, *(line.name for line in extents)):
        if any(character in value for character in '"\r\n\0') or len(_encode(value)) > MAX_NAME:
            raise ConfigError(f"{value!r} cannot be written into a VMDK descriptor")
    heads = 16 if adapter_type == "ide" else 255
    cylinders = size // (63 * heads * SECTOR_SIZE)
    lines = [
        SIGNATURE.decode(),
        "version=1",
        f"CID={cid:08x}",
        f"parentCID={parent_cid:08x}",
        f'createType="{create_type}"',
        f'parentFileNameHint="{parent_name}"' if parent_name is not None else "",
        "# Extent description",
        *(line.text() for line in extents),
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        f'ddb.virtualHWVersion = "{hw_version}"',
        f'ddb.geometry.cylinders = "{cylinders}"',
        f'ddb.geometry.heads = "{heads}"',
        'ddb.geometry.sectors = "63"',
        f'ddb.adapterType = "{adapter_type}"',
        f'ddb.toolsVersion = "{tools_version}"',
    ]
    return _encode("\n".join(lines) + "\n")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
