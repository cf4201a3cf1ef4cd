"""The transmission flags follow from what the export can do."""

from __future__ import annotations

import pytest

from nbdserve.exports.flags import transmission_flags
from nbdserve.protocol import constants as nbd

ALWAYS = (
    nbd.EXPORT_HAS_FLAGS
    | nbd.EXPORT_SEND_FLUSH
    | nbd.EXPORT_SEND_FUA
    | nbd.EXPORT_CAN_MULTI_CONN
    | nbd.EXPORT_SEND_CACHE
)
WRITABLE = ALWAYS | nbd.EXPORT_SEND_TRIM | nbd.EXPORT_SEND_WRITE_ZEROES


@pytest.mark.parametrize(
    ("read_only", "fast_zero", "flags"),
    [
        (True, False, ALWAYS | nbd.EXPORT_READ_ONLY),
        (True, True, ALWAYS | nbd.EXPORT_READ_ONLY),
        (False, False, WRITABLE),
        (False, True, WRITABLE | nbd.EXPORT_SEND_FAST_ZERO),
    ],
)
def test_flags(read_only: bool, fast_zero: bool, flags: int) -> None:
    assert transmission_flags(read_only=read_only, fast_zero=fast_zero) == flags
