"""Which format a file is in, from its first and last bytes. Only for images the user names without a format.

The answer is qemu-img's wherever both know the format, and fixed VHD, whose only mark is the footer, is found as well.

A guest chooses the bytes of a raw image, so a probe can be fooled: a format an image header should declare is never
probed, and a raw image that was probed refuses writes that would make it look like another format.
"""

from __future__ import annotations

from typing import Final

from nbdserve.storage.base import Storage

PROBE_LENGTH: Final = 512
"""Bytes from the start of the file, and from its end, that decide."""

MAGICS: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"QED\x00", "qed"),
    (0, b"WithoutFreeSpace\x02\x00\x00\x00", "parallels"),
    (0, b"WithouFreSpacExt\x02\x00\x00\x00", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"QFI\xfb\x00\x00\x00\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"LUKS\xba\xbe\x00\x01", "luks"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n", "cloop"),
    (0, b"RCOW\x00\x00\x00\x01", "raw-cow"),
)
"""``(offset, bytes, format)``: the first match decides, in the order in which qemu-img prefers one of two that match.
Formats without a driver are listed too, so that such a file is refused by its name instead of being served, and
damaged, as raw."""

_VHD_FIXED: Final = 2


def format_of(head: bytes | bytearray | memoryview, tail: bytes | bytearray | memoryview = b"", name: str = "") -> str:
    """The format of the file called ``name``: ``"raw"`` when nothing speaks for another.

    ``head`` and ``tail`` are its first and last PROBE_LENGTH bytes, ``head`` as if zeroes followed the end of the file.
    """
    head = bytes(head[:PROBE_LENGTH]).ljust(PROBE_LENGTH, b"\0")
    for offset, magic, found in MAGICS:
        if head.startswith(magic, offset):
            return found
    if _is_vmdk_descriptor(head):
        return "vmdk"
    if _is_bochs(head):
        return "bochs"
    if _is_fixed_vhd_footer(bytes(tail)):
        return "vpc"
    return "dmg" if name.endswith(".dmg") and len(name) > len(".dmg") else "raw"


def _is_vmdk_descriptor(head: bytes) -> bool:
    """Comments and lines of spaces, and then a line that is ``version=1``, ``2`` or ``3`` to the letter."""
    lines = head.split(b"\n")
    for line in lines[:-1]:
        if line.startswith(b"#") or (line.startswith(b" ") and not line.removesuffix(b"\r").strip(b" ")):
            continue
        return line.removesuffix(b"\r") in {b"version=1", b"version=2", b"version=3"}
    return False


def _is_bochs(head: bytes) -> bool:
    """Three names, each ended by a NUL, and the version 1.0 or 2.0."""
    names = [head[start:stop].partition(b"\0")[0] for start, stop in ((0, 32), (32, 48), (48, 64))]
    version = int.from_bytes(head[64:68], "little")
    return names == [b"Bochs Virtual HD Image", b"Redolog", b"Growing"] and version in {0x10000, 0x20000}


def _is_fixed_vhd_footer(tail: bytes) -> bool:
    """A whole footer of a *fixed* disk, of 512 bytes or, from old makers, 511, with its checksum.

    Not of another type: those have a copy at the start of the file, and what follows from one found at the end alone,
    such as a parent file, is nothing a guest should be able to write.
    """
    for footer in (tail[-512:], tail[-511:]):
        if len(footer) >= 511 and footer.startswith(b"conectix"):
            disk_type, checksum = (int.from_bytes(footer[at : at + 4], "big") for at in (60, 64))
            return disk_type == _VHD_FIXED and checksum == ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF
    return False


async def probe(storage: Storage) -> str:
    """The format name of the image on ``storage``. OSError when it cannot be read."""
    tail_length = min(PROBE_LENGTH, storage.size)
    head = await storage.read(0, PROBE_LENGTH)
    return format_of(head, await storage.read(storage.size - tail_length, tail_length), storage.path)
