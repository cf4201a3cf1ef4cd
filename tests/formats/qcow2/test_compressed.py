"""Compressed data that is not what it should be makes an error and little else."""

from __future__ import annotations

import errno
import zlib

import pytest
import zstandard

from nbdserve.errors import RequestError
from nbdserve.formats.qcow2.compressed import decompress
from nbdserve.formats.qcow2.layout import COMPRESSION_ZLIB, COMPRESSION_ZSTD

SIZE = 65536
CONTENT = b"".join(n.to_bytes(4, "big") for n in range(SIZE // 4))


def _zlib(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-12)
    return deflater.compress(data) + deflater.flush()


def _zstd(data: bytes, *, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=sized).compress(data)


@pytest.mark.parametrize("content", [CONTENT, bytes(SIZE)])
@pytest.mark.parametrize("junk", [b"", b"\xff" * 511, bytes(300)])
def test_junk_behind_the_data_is_ignored(content: bytes, junk: bytes) -> None:
    assert decompress(_zlib(content) + junk, SIZE, COMPRESSION_ZLIB) == content
    for sized in (True, False):
        assert decompress(_zstd(content, sized=sized) + junk, SIZE, COMPRESSION_ZSTD) == content


BAD = {
    "truncated": lambda pack: pack(CONTENT)[:-4000],
    "short": lambda pack: pack(CONTENT[:-1]),
    "oversized": lambda pack: pack(CONTENT + b"x"),
    "bomb": lambda pack: pack(bytes(256 * SIZE)),
    "two frames": lambda pack: pack(CONTENT[: SIZE // 2]) + pack(CONTENT[SIZE // 2 :]),
    "garbage": lambda pack: b"\xff" * 600,
    "nothing": lambda pack: b"",
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("kind", [COMPRESSION_ZLIB, COMPRESSION_ZSTD])
def test_what_is_not_one_cluster_is_refused(what: str, kind: int) -> None:
    packs = [_zlib] if kind == COMPRESSION_ZLIB else [_zstd, lambda data: _zstd(data, sized=False)]
    for pack in packs:
        with pytest.raises(RequestError) as caught:
            decompress(BAD[what](pack), SIZE, kind)
        assert caught.value.errno == errno.EIO


def test_a_declared_size_is_not_believed() -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\0\0"
    with pytest.raises(RequestError):
        decompress(frame, SIZE, COMPRESSION_ZSTD)
