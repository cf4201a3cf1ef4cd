"""CRC-32C (Castagnoli), the checksum of VHDX and of raw-cow headers: RFC 3720, appendix B.4."""

from __future__ import annotations

import google_crc32c

from nbdserve.storage.base import ReadBuffer


def crc32c(data: ReadBuffer) -> int:
    """The checksum of ``data`` as an unsigned 32-bit number; 11 us for 64 KiB."""
    return int(google_crc32c.value(bytes(data)))
