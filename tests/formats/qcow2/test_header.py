"""Headers: what QEMU writes is read and built again byte for byte; what is impossible is refused by name."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.header import Header
from tests.formats.qcow2.engine import create

KIB = 1024


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("layout") / "a.qcow2"
    return create(path, "1G", "", "-b", "/tmp/none.raw", "-F", "raw", "-u").read_bytes()


def _parse(image: bytes) -> Header:
    return Header.parse(image[: 64 * KIB], "a.qcow2", len(image))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "extended_l2=on,compression_type=zstd",
        "refcount_bits=1,lazy_refcounts=on",
        "cluster_size=512",
    ],
)
def test_qemu_headers_are_built_again(tmp_path: Path, options: str) -> None:
    data = create(tmp_path / "a.qcow2", "1G", options).read_bytes()
    header = Header.parse(data[: 64 * KIB], "a", len(data))
    built = header.build()
    assert built == data[: len(built)]
    assert not any(data[len(built) : header.cluster_size])


def test_backing_file(image: bytes) -> None:
    header = _parse(image)
    assert (header.backing_name, header.backing_format) == ("/tmp/none.raw", "raw")
    built = header.build()
    assert built == image[: len(built)]


def test_unknown_extensions_and_fields_are_kept(image: bytes) -> None:
    header = _parse(image)
    changed = Header(
        **{name: getattr(header, name) for name in header.__slots__}
        | {"extensions": ((0x12345678, b"abc"), *header.extensions), "header_length": 120, "extra": b"12345678"}
    )
    assert Header.parse(changed.build().ljust(64 * KIB, b"\0"), "a", len(image)) == changed


FIELDS = [
    ("version", 4, ">I"),
    ("cluster_bits", 20, ">I"),
    ("crypt_method", 32, ">I"),
    ("size", 24, ">Q"),
    ("l1_size", 36, ">I"),
    ("l1_table_offset", 40, ">Q"),
    ("refcount_table_offset", 48, ">Q"),
    ("refcount_table_clusters", 56, ">I"),
    ("nb_snapshots", 60, ">I"),
    ("refcount_order", 96, ">I"),
    ("header_length", 100, ">I"),
    ("backing_file_offset", 8, ">Q"),
    ("incompatible_features", 72, ">Q"),
]


@pytest.mark.parametrize(("field", "at", "form"), FIELDS, ids=[name for name, _, _ in FIELDS])
def test_impossible_values_are_named(image: bytes, field: str, at: int, form: str) -> None:
    largest = (1 << 8 * struct.calcsize(form)) - 1
    data = bytearray(image)
    struct.pack_into(form, data, at, largest)
    with pytest.raises(ImageError) as caught:
        _parse(bytes(data))
    assert caught.value.field is not None
    assert caught.value.path == "a.qcow2"


@pytest.mark.parametrize(("field", "at", "form"), FIELDS, ids=[name for name, _, _ in FIELDS])
def test_boundary_values_open_or_are_refused(image: bytes, field: str, at: int, form: str) -> None:
    bits = 8 * struct.calcsize(form)
    for power in range(bits):
        for value in {(1 << power) - 1, 1 << power, (1 << power) + 1}:
            data = bytearray(image)
            struct.pack_into(form, data, at, value & (1 << bits) - 1)
            try:
                header = _parse(bytes(data))
            except ImageError:
                continue
            assert header.l1_entries * header.l2_coverage >= header.size
            assert header.l1_offset + header.l1_entries * 8 <= len(image)


def test_unknown_features_are_named_from_the_table(image: bytes) -> None:
    header = _parse(image)
    names = layout.feature_name_table([*layout.FEATURE_NAMES, (0, 9, "time travel")])
    changed = Header(
        **{name: getattr(header, name) for name in header.__slots__}
        | {"incompatible": 1 << 9 | 1 << 40, "extensions": ((layout.EXTENSION_FEATURE_NAMES, names),)}
    )
    with pytest.raises(UnsupportedImageError, match=r"bit 9 \(time travel\), bit 40"):
        _parse(changed.build().ljust(64 * KIB, b"\0") + image[64 * KIB :])


def test_extension_past_the_cluster_is_refused(image: bytes) -> None:
    data = bytearray(image)
    struct.pack_into(">II", data, 112, 0x11111111, 0xFFFFFFF0)
    with pytest.raises(CorruptImageError, match="0x11111111"):
        _parse(bytes(data))


@given(st.binary(max_size=600))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    for start in (b"", layout.MAGIC + b"\0\0\0\3", layout.MAGIC + b"\0\0\0\2" + bytes(12) + b"\0\0\0\x10"):
        with contextlib.suppress(ImageError):
            Header.parse(start + data, "fuzz", 1 << 20)
