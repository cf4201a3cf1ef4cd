"""What an export can do, as NBD transmission flags (spec, "Transmission flags"). Pure."""

from __future__ import annotations

from nbdserve.protocol.constants import (
    EXPORT_CAN_MULTI_CONN,
    EXPORT_HAS_FLAGS,
    EXPORT_READ_ONLY,
    EXPORT_SEND_CACHE,
    EXPORT_SEND_FAST_ZERO,
    EXPORT_SEND_FLUSH,
    EXPORT_SEND_FUA,
    EXPORT_SEND_TRIM,
    EXPORT_SEND_WRITE_ZEROES,
)


def transmission_flags(*, read_only: bool, fast_zero: bool, multi_conn: bool = True) -> int:
    """The flags of an export; the handshake adds those that depend on the reply mode.

    MULTI_CONN is true of every export here, for all connections share one node, whose FLUSH covers every write replied
    to. ``multi_conn`` is False where a second connection would only wait (qemu-nbd -e 1): nbdcopy opens four and hangs.
    """
    flags = EXPORT_HAS_FLAGS | EXPORT_SEND_FLUSH | EXPORT_SEND_FUA | EXPORT_SEND_CACHE
    if multi_conn:
        flags |= EXPORT_CAN_MULTI_CONN
    if read_only:
        return flags | EXPORT_READ_ONLY
    flags |= EXPORT_SEND_TRIM | EXPORT_SEND_WRITE_ZEROES
    return flags | EXPORT_SEND_FAST_ZERO if fast_zero else flags
