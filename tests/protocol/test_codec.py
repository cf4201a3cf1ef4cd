from __future__ import annotations

import errno
from struct import Struct

import pytest

from nbdserve.protocol import codec, constants


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (codec.GREETING, 18),
        (codec.OPTION, 16),
        (codec.OPTION_REPLY, 20),
        (codec.REQUEST, 28),
        (codec.EXTENDED_REQUEST, 32),
        (codec.SIMPLE_REPLY, 16),
        (codec.STRUCTURED_REPLY, 20),
        (codec.EXTENDED_REPLY, 32),
    ],
)
def test_headers_have_the_sizes_of_the_specification(layout: Struct, size: int) -> None:
    assert layout.size == size


@pytest.mark.parametrize(
    ("error", "wire"),
    [
        (0, 0),
        (errno.EPERM, constants.NBD_EPERM),
        (errno.EROFS, constants.NBD_EPERM),
        (errno.EIO, constants.NBD_EIO),
        (errno.ENOMEM, constants.NBD_ENOMEM),
        (errno.EINVAL, constants.NBD_EINVAL),
        (errno.ENOSPC, constants.NBD_ENOSPC),
        (errno.EDQUOT, constants.NBD_ENOSPC),
        (errno.EFBIG, constants.NBD_ENOSPC),
        (errno.EOVERFLOW, constants.NBD_EOVERFLOW),
        (errno.ENOTSUP, constants.NBD_ENOTSUP),
        (errno.ESHUTDOWN, constants.NBD_ESHUTDOWN),
        (errno.EBADF, constants.NBD_EINVAL),
        (99999, constants.NBD_EINVAL),
    ],
)
def test_wire_error(error: int, wire: int) -> None:
    assert codec.wire_error(error) == wire


def test_text_is_clipped_at_a_character() -> None:
    assert codec.clip_text("abc") == b"abc"
    assert codec.clip_text("x" + "é" * 4096) == b"x" + "é".encode() * 2047
    assert codec.clip_text("bad \udc80 name") == b"bad ? name"


@pytest.mark.parametrize("data", [b"", b"a" * 4096, "é".encode()])
def test_decode_text(data: bytes) -> None:
    assert codec.decode_text(data).encode() == data


@pytest.mark.parametrize("data", [b"a" * 4097, b"a\0b", b"\xff"])
def test_text_that_breaks_the_rules_of_strings(data: bytes) -> None:
    with pytest.raises(codec.Malformed):
        codec.decode_text(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\x05disk\0\0",
        b"\0\0\0\x03disk\0\0",
        b"\0\0\0\x04disk",
        b"\0\0\0\x04disk\0\x01\0",
        b"\0\0\0\x04disk\0\x01\0\x03x",
        b"\0\0\0\x04disk\xff\xff" + bytes(2 * 0xFFFF),
    ],
)
def test_inner_lengths_must_fit_the_outer_one(data: bytes) -> None:
    with pytest.raises(codec.Malformed):
        codec.parse(codec.INFO_REQUEST, data)


def test_info_request() -> None:
    data = b"\0\0\0\x04disk\0\x02\0\x03\0\x01"
    request = codec.parse(codec.INFO_REQUEST, data)
    assert (request.name, list(request.infos)) == (b"disk", [3, 1])
    assert codec.build(codec.INFO_REQUEST, name=b"disk", infos=[3, 1]) == data


def test_info_replies() -> None:
    assert codec.build(codec.INFO_REPLY, type=0, info={"size": 5, "flags": 3}) == bytes.fromhex(
        "0000 0000000000000005 0003"
    )
    assert codec.build(codec.INFO_REPLY, type=1, info=b"x") == b"\0\x01x"
    sizes = {"minimum": 1, "preferred": 4096, "maximum": 0x2000000}
    assert codec.build(codec.INFO_REPLY, type=3, info=sizes) == bytes.fromhex("0003 00000001 00001000 02000000")


def test_meta_request_has_a_bounded_number_of_queries() -> None:
    assert (
        len(codec.parse(codec.META_REQUEST, codec.build(codec.META_REQUEST, name=b"", queries=[b""] * 1024)).queries)
        == 1024
    )
    with pytest.raises(codec.Malformed):
        codec.parse(codec.META_REQUEST, b"\0\0\0\0" + (1025).to_bytes(4, "big") + bytes(4 * 1025))


def test_chunks_structured() -> None:
    assert codec.none_chunk(1, 7, 99) == bytes.fromhex("668e33ef 0001 0000 0000000000000007 00000000")
    assert (
        codec.error_chunk(1, 7, 99, 5, "no")
        == bytes.fromhex("668e33ef 0001 8001 0000000000000007 00000008 00000005 0002") + b"no"
    )
    assert codec.hole_chunk(1, 1, 7, 99, 99, 512) == bytes.fromhex(
        "668e33ef 0001 0002 0000000000000007 0000000c 0000000000000063 00000200"
    )
    assert codec.data_chunk_head(1, 0, 7, 99, 100, 4) == bytes.fromhex(
        "668e33ef 0000 0001 0000000000000007 0000000c 0000000000000064"
    )
    assert codec.block_status_chunk(1, 1, 7, 0, 2, [(512, 3), (1024, 0)]) == bytes.fromhex(
        "668e33ef 0001 0005 0000000000000007 00000014 00000002 00000200 00000003 00000400 00000000"
    )


def test_chunks_extended_carry_the_offset_of_the_request() -> None:
    assert codec.none_chunk(2, 7, 99) == bytes.fromhex(
        "6e8a278c 0001 0000 0000000000000007 0000000000000063 0000000000000000"
    )
    assert codec.block_status_chunk(2, 1, 7, 99, 2, [(1 << 33, 3)]) == bytes.fromhex(
        "6e8a278c 0001 0006 0000000000000007 0000000000000063 0000000000000018 00000002 00000001"
        "0000000200000000 0000000000000003"
    )


def test_final_reply_by_mode() -> None:
    assert codec.final_reply(0, 7, 99, 22, "text") == codec.simple_reply(7, 22)
    assert codec.final_reply(1, 7, 99) == codec.none_chunk(1, 7, 99)
    assert codec.final_reply(2, 7, 99, 22, "text") == codec.error_chunk(2, 7, 99, 22, "text")


def test_error_text_is_at_most_4096_bytes() -> None:
    assert len(codec.error_chunk(1, 1, 0, 5, "x" * 100_000)) == 20 + 6 + 4096
