"""Apple Data Compression: literals, and copies of what was already produced.

A first byte of 80-ff: 1 to 128 literal bytes follow. 40-7f: copy 4 to 67 bytes, from as far back as the next two bytes
say (big endian, 0 is the last byte produced). 00-3f: copy 3 to 18 bytes, from as far back as its two lowest bits and
the next byte say.
"""

from __future__ import annotations

import errno

from nbdserve.errors import RequestError


def expand(stored: bytes | bytearray, size: int) -> bytes:
    """The ``size`` bytes of ADC data. RequestError(EIO) when it does not make exactly these, or is damaged."""
    produced = bytearray()
    at, end = 0, len(stored)
    while at < end and len(produced) < size:
        code = stored[at]
        if code & 0x80:
            length = (code & 0x7F) + 1
            literal = stored[at + 1 : at + 1 + length]
            if len(literal) < length:
                break
            produced += literal
            at += 1 + length
            continue
        used = 3 if code & 0x40 else 2
        if at + used > end:
            break
        if code & 0x40:
            length, back = (code & 0x3F) + 4, (stored[at + 1] << 8 | stored[at + 2]) + 1
        else:
            length, back = (code >> 2) + 3, ((code & 3) << 8 | stored[at + 1]) + 1
        if back > len(produced):
            raise RequestError(errno.EIO, f"ADC data: copies from {back} bytes back, after {len(produced)}")
        start = len(produced) - back
        source = produced[start : start + length]
        produced += (source * (length // len(source) + 1))[:length]
        at += used
    if len(produced) != size:
        raise RequestError(errno.EIO, f"ADC data: {len(produced)} bytes instead of {size}")
    return bytes(produced)
