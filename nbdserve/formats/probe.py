"""Which format a file is in, from its first bytes. Only for images the user names without a format.

A guest chooses the bytes of a raw image, so a probe can be fooled: a format an image header should declare is never
probed, and a raw image that was probed refuses writes that would make it look like another format.
"""

from __future__ import annotations

from typing import Final

from nbdserve.storage.base import Storage

PROBE_LENGTH: Final = 512
"""Bytes from the start of the file that decide."""

MAGICS: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"QFI\xfb\x00\x00\x00\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\x00", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"RCOW\x00\x00\x00\x01", "raw-cow"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
"""``(offset, bytes, format)``: the first match decides. Formats without a driver are listed too, so that such a file is
refused by its name instead of being served, and damaged, as raw."""


def format_of(head: bytes | bytearray | memoryview) -> str:
    """The format whose magic is in ``head``, the first PROBE_LENGTH bytes of a file; ``"raw"`` when there is none."""
    head = bytes(head[:PROBE_LENGTH])
    for offset, magic, name in MAGICS:
        if head.startswith(magic, offset):
            return name
    return "raw"


async def probe(storage: Storage) -> str:
    """The format name of the image on ``storage``. OSError when it cannot be read."""
    return format_of(await storage.read(0, PROBE_LENGTH))
