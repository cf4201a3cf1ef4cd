"""Deflating clusters for qcow and qcow2. Pure and blocking, like ``inflate``: run it on a worker thread."""

from __future__ import annotations

import zlib
from typing import Final

from isal import isal_zlib

from nbdserve.formats.inflate import DEFLATE_4K_WINDOW
from nbdserve.storage.base import ReadBuffer

_LEVEL: Final = 3
"""The best of isal's; 5 times as fast as zlib's usual level."""


def deflate(cluster: ReadBuffer) -> bytes | None:
    """The raw deflate stream, with a window of at most 4 KiB; None where it is not smaller."""
    deflater = isal_zlib.compressobj(_LEVEL, zlib.DEFLATED, DEFLATE_4K_WINDOW)
    stored: bytes = deflater.compress(cluster) + deflater.flush()
    return stored if len(stored) < len(cluster) else None


def deflate_all(data: memoryview, cluster_size: int) -> list[bytes | None]:
    """``deflate`` of each cluster."""
    return [deflate(data[start : start + cluster_size]) for start in range(0, len(data), cluster_size)]
