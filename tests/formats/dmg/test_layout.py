from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.dmg import layout
from nbdserve.formats.dmg.layout import KOLY, MISH, Chunks, Trailer, tables_of_property_list, tables_of_resource_fork
from tests.formats.dmg.build import Chunk, Image, property_list, resource_fork

SIZE = 100_000


def image(*chunks: Chunk, **fields: int) -> bytes:
    made = Image(64, [list(chunks) or [Chunk(layout.RAW, 0, 64, b"x" * 32768)]], [0])
    made.trailer = fields
    return made.build()


def trailer(data: bytes) -> Trailer:
    return Trailer.parse(data[-512:], len(data) - 512, "disk.dmg")


def chunks(data: bytes) -> Chunks:
    found = trailer(data)
    assert found.xml is not None
    offset, length = found.xml
    return Chunks.collect(
        tables_of_property_list(data[offset : offset + length], "disk.dmg"), found, len(data) - 512, "disk.dmg"
    )


def test_the_places_of_the_fields() -> None:
    assert (KOLY.sizeof(), MISH.sizeof(), layout.CHUNK.itemsize) == (512, 204, 40)
    data = image()
    at = len(data) - 512
    assert struct.unpack_from(">Q", data, at + 24) == (0,)
    assert struct.unpack_from(">Q", data, at + 492) == (64,)
    xml_offset, xml_length = struct.unpack_from(">QQ", data, at + 216)
    assert data[xml_offset:].startswith(b"<?xml")
    assert xml_offset + xml_length == at
    assert trailer(data) == Trailer(32768, 0, None, (xml_offset, xml_length))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"segment_count": 2}, "segment_count"),
        ({"sector_count": 1 << 60}, "sector_count"),
        ({"data_fork_offset": 1 << 40}, "data_fork_offset"),
        ({"xml_offset": 1 << 63}, "xml_offset"),
        ({"xml_length": 1 << 20}, "xml_offset"),
        ({"xml_length": 1 << 63}, "xml_length"),
        ({"xml_length": 0}, "xml_length"),
        ({"rsrc_fork_length": 1, "rsrc_fork_offset": 1 << 50}, "rsrc_fork_offset"),
        ({"rsrc_fork_length": 1 << 30}, "rsrc_fork_length"),
    ],
)
def test_a_bad_trailer(fields: dict[str, int], name: str) -> None:
    with pytest.raises(ImageError) as caught:
        trailer(image(**fields))
    assert caught.value.field == name
    assert str(caught.value).startswith("disk.dmg: ")


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (Chunk(0x80000003, 0, 1), "chunk type"),
        (Chunk(0x80000008, 0, 1), "chunk type"),
        (Chunk(layout.RAW, 0, 2, b"x" * 1023), "chunk length"),
        (Chunk(layout.RAW, 0, 1, b"x" * 512, offset=SIZE), "chunk offset"),
        (Chunk(layout.ZLIB, 0, 1, b"x" * 512, offset=1 << 63), "chunk offset"),
        (Chunk(layout.ZLIB, 0, 1, b"x" * 512, length=SIZE), "chunk offset"),
        (Chunk(layout.ZLIB, 0, 1, b"x" * 512, length=1 << 63), "chunk length"),
        (Chunk(layout.ZLIB, 0, 1 << 16, b"x"), "chunk count"),
        (Chunk(layout.ADC, 0, (1 << 11) + 1, b"x"), "chunk count"),
        (Chunk(layout.ZERO_FILL, 0, 1 << 60), "chunk count"),
        (Chunk(layout.ZERO_FILL, 1 << 60, 1), "chunk sector"),
    ],
)
def test_a_bad_chunk(bad: Chunk, name: str) -> None:
    with pytest.raises(ImageError) as caught:
        chunks(image(bad))
    assert caught.value.field == name
    assert str(caught.value).startswith("disk.dmg: ")


def test_chunks_that_overlap() -> None:
    data = image(Chunk(layout.ZERO_FILL, 0, 10), Chunk(layout.ZERO_FILL, 9, 10))
    with pytest.raises(ImageError, match="overlap"):
        chunks(data)
    found = chunks(image(Chunk(layout.ZERO_FILL, 10, 10), Chunk(layout.IGNORED, 0, 10)))
    assert (found.start.tolist(), found.kind.tolist()) == ([0, 5120], [layout.IGNORED, layout.ZERO_FILL])


def test_places_of_zeroes_do_not_matter() -> None:
    found = chunks(image(Chunk(layout.ZERO_FILL, 0, 64, offset=SIZE * 10, length=5)))
    assert found.length.tolist() == [32768]


def test_a_table_out_of_range() -> None:
    made = Image(64, [[Chunk(layout.ZERO_FILL, 0, 64)]], [1 << 60])
    with pytest.raises(ImageError, match="first_sector"):
        chunks(made.build())


@pytest.mark.parametrize("text", [b"", b"<data></data>", b"<data>bWlzaA==</data>", property_list([b"csum"])])
def test_no_table(text: bytes) -> None:
    with pytest.raises(ImageError, match="mish"):
        Chunks.collect(tables_of_property_list(text, "x"), Trailer(512, 0, None, None), 0, "x")


def test_tables_are_not_without_number() -> None:
    one = Image(8, [[Chunk(layout.ZERO_FILL, 0, 8)]], [0]).build()
    found = trailer(one)
    assert found.xml is not None
    [table] = [table for table in tables_of_property_list(one[: sum(found.xml)], "x") if table.startswith(b"mish")]
    asked: list[int] = []

    def endless() -> Iterator[bytes]:
        while True:
            asked.append(1)
            yield table

    with pytest.raises(ImageError, match="more than 1024 tables"):
        Chunks.collect(endless(), found, len(one), "x")
    assert len(asked) == 1025


def test_text_that_is_no_base64() -> None:
    with pytest.raises(ImageError, match="<data>"):
        list(tables_of_property_list(b"<data>abcde</data>", "x"))


def test_resources() -> None:
    parts = [b"one", b"two" * 100]
    assert list(tables_of_resource_fork(resource_fork(parts), "x")) == parts
    for data in (
        b"",
        bytes(11),
        struct.pack(">III", 1000, 0, 1),
        struct.pack(">III", 0, 0, 1000),
        struct.pack(">IIII", 12, 0, 4, 0),
        struct.pack(">IIII", 12, 0, 4, 0xFFFFFFFF),
        struct.pack(">IIII", 12, 0, 2, 1),
    ):
        with pytest.raises(ImageError):
            list(tables_of_resource_fork(data, "x"))
