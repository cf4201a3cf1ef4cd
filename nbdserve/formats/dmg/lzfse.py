"""LZFSE, by the reference implementation in the optional package ``lzfse``.

The package's own ``decompress`` makes as many bytes as the data asks for. The decoder it is built on fills a buffer and
stops, so it is that which is called.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
from functools import cache
from typing import Any

from nbdserve.errors import RequestError


@cache
def _decoder() -> Any:
    """``size_t lzfse_decode_buffer(dst, dst_size, src, src_size, scratch)``; None when it is not there."""
    try:
        file = importlib.import_module("lzfse").__file__
        function = ctypes.CDLL(file).lzfse_decode_buffer
    except (ImportError, OSError, AttributeError):
        return None
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    return function


def available() -> bool:
    """Whether the package is installed."""
    return _decoder() is not None


def expand(stored: bytes | bytearray, size: int) -> bytes:
    """The ``size`` bytes of LZFSE data. RequestError(EIO) when it does not make exactly these, or is damaged."""
    decode = _decoder()
    if decode is None:
        raise RequestError(errno.ENOTSUP, "LZFSE data: the package lzfse is not installed")
    produced = ctypes.create_string_buffer(size + 1)  # one more, to tell a buffer that is full from one that overflows
    made = decode(produced, size + 1, bytes(stored), len(stored), None)
    if made != size:
        more = "more than" if made > size else f"{made} bytes instead of"
        raise RequestError(errno.EIO, f"LZFSE data: {more} {size}")
    return produced.raw[:size]
