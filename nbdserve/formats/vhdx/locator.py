"""The parent locator of a differencing image: which file its parent is, and how to know it ([MS-VHDX] 2.6.2.6)."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import construct as c

from nbdserve.errors import ConfigError, CorruptImageError, UnsupportedImageError

VHDX_LOCATOR: Final = UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913")

HEAD: Final[Any] = c.Struct("locator_type" / c.Bytes(16), "reserved" / c.Int16ul, "count" / c.Int16ul)
ENTRY: Final = struct.Struct("<IIHH")
"""Offsets of key and value, their lengths; there can be 65535 of them, too many for ``construct``."""
PATH_KEYS: Final = ("relative_path", "volume_path", "absolute_win32_path")
"""In the order in which they are to be tried."""
LINKAGE_KEYS: Final = ("parent_linkage", "parent_linkage2")
_LONGEST_KEY: Final = 64
"""Bytes; longer ones are none of those above."""


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """Keys and values, those that have a meaning."""

    values: dict[str, str]

    @classmethod
    def parse(cls, data: bytes, path: str) -> ParentLocator:
        """From the content of the metadata item; ImageError where it does not tell the parent."""
        if len(data) < HEAD.sizeof():
            raise CorruptImageError(path, "too short", field="length of parent locator", value=len(data))
        head = HEAD.parse(data)
        kind = UUID(bytes_le=head.locator_type)
        if kind != VHDX_LOCATOR:
            raise UnsupportedImageError(path, "the parent is no VHDX image", field="LocatorType", value=str(kind))
        start, stop = HEAD.sizeof(), HEAD.sizeof() + head.count * ENTRY.size
        if stop > len(data):
            raise CorruptImageError(path, "more than the item holds", field="KeyValueCount", value=head.count)
        values: dict[str, str] = {}
        for key_offset, value_offset, key_length, value_length in ENTRY.iter_unpack(data[start:stop]):
            if key_length > _LONGEST_KEY:
                continue
            key = _text(data, key_offset, key_length, "key", path)
            if key not in PATH_KEYS and key not in LINKAGE_KEYS:
                continue
            if key in values:
                raise CorruptImageError(path, "there are two of it", field="parent locator key", value=key)
            values[key] = _text(data, value_offset, value_length, key, path)
        locator = cls(values)
        locator.linkages(path)
        if not any(values.get(key) for key in PATH_KEYS):
            raise CorruptImageError(path, "names no parent", field="parent locator", value=sorted(values))
        return locator

    def linkages(self, path: str) -> tuple[UUID, ...]:
        """The identities the parent may have: its DataWriteGuid is to be one of them."""
        found = []
        for key in LINKAGE_KEYS:
            text = self.values.get(key)
            if text is None:
                continue
            try:
                found.append(UUID(text))
            except ValueError:
                raise CorruptImageError(path, "must be a GUID in braces", field=key, value=text) from None
        if "parent_linkage" not in self.values:
            raise CorruptImageError(path, "missing", field="parent_linkage", value=None)
        return tuple(found)

    @property
    def name(self) -> str:
        """The file name of the parent, with ``/`` between its parts; a relative one begins at the image's directory."""
        text = next(text for key in PATH_KEYS if (text := self.values.get(key)))
        return text.replace("\\", "/")

    def build(self) -> bytes:
        """The content of the metadata item. ValueError when it is longer than its fields can say."""
        at = HEAD.sizeof() + len(self.values) * ENTRY.size
        entries, stored = b"", b""
        for key, value in self.values.items():
            key_bytes, value_bytes = key.encode("utf-16-le"), value.encode("utf-16-le")
            if len(value_bytes) >= 1 << 16:
                raise ValueError(f"{key}: {len(value_bytes)} bytes, at most 65535")
            key_at = at + len(stored)
            entries += ENTRY.pack(key_at, key_at + len(key_bytes), len(key_bytes), len(value_bytes))
            stored += key_bytes + value_bytes
        head: bytes = HEAD.build({"locator_type": VHDX_LOCATOR.bytes_le, "reserved": 0, "count": len(self.values)})
        return head + entries + stored


def locator_for(name: str, data_write_guid: UUID) -> ParentLocator:
    """The locator of an image whose parent is the file ``name``. ConfigError for a name it cannot hold."""
    if "\\" in name:
        raise ConfigError(f"backing_file={name}: VHDX separates directories by backslashes, so a name can have none")
    try:
        name.encode("utf-16-le")
    except UnicodeEncodeError:
        raise ConfigError(f"backing_file={os.fsencode(name)!r}: VHDX names are UTF-16, and this is not UTF-8") from None
    key = "absolute_win32_path" if name.startswith("/") else "relative_path"
    return ParentLocator({"parent_linkage": f"{{{data_write_guid}}}", key: name.replace("/", "\\")})


def _text(data: bytes, offset: int, length: int, field: str, path: str) -> str:
    if offset + length > len(data):
        raise CorruptImageError(path, "past the end of the parent locator", field=f"offset of {field}", value=offset)
    try:
        return data[offset : offset + length].decode("utf-16-le")
    except UnicodeDecodeError:
        stored = bytes(data[offset : offset + min(length, 32)])
        raise CorruptImageError(path, "not UTF-16", field=field, value=stored) from None
