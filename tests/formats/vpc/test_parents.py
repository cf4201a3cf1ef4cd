"""Names of parents, as Windows and Mac OS write them."""

from __future__ import annotations

import pytest

from nbdserve.formats.vpc.layout import Locator
from nbdserve.formats.vpc.parents import decode_name, make_locators, portable, preferred


@pytest.mark.parametrize(
    ("code", "stored", "name"),
    [
        (b"W2ru", ".\\base.vhd".encode("utf-16-le"), "base.vhd"),
        (b"W2ru", "..\\up\\base.vhd".encode("utf-16-le"), "../up/base.vhd"),
        (b"W2ru", "base.vhd\0\0".encode("utf-16-le"), "base.vhd"),
        (b"W2ku", "C:\\VMs\\Grundgerät.vhd".encode("utf-16-le"), "Grundgerät.vhd"),
        (b"W2ku", "\\\\server\\share\\base.vhd".encode("utf-16-le"), "base.vhd"),
        (b"W2ku", "\\\\?\\C:\\VMs\\base.vhd".encode("utf-16-le"), "base.vhd"),
        (b"Wi2r", b".\\base.vhd\0", "base.vhd"),
        (b"MacX", b"file://./base%20one.vhd\0", "base one.vhd"),
        (b"MacX", b"file:///images/base.vhd", "/images/base.vhd"),
        (b"MacX", b"file://localhost/images/base.vhd", "/images/base.vhd"),
        (b"MacX", b"http://host/base.vhd", None),
        (b"MacX", b"nbd:base.vhd", None),
        (b"MacX", b"file://./nbd%3Abase.vhd", "./nbd:base.vhd"),
        (b"MacX", b"\xff\xfe", None),
        (b"W2ru", b"\x00\xd8", None),
        (b"W2ru", b"", None),
    ],
)
def test_decode(code: bytes, stored: bytes, name: str | None) -> None:
    assert decode_name(code, stored) == name


def test_preferred() -> None:
    locators = tuple(Locator(code, 8, 0) for code in (b"W2ku", b"Mac ", b"MacX", b"W2ru", b"\0\0\0\0"))
    assert [locator.code for locator in preferred((*locators, Locator(b"W2ru", 0, 0)))] == [b"W2ru", b"MacX", b"W2ku"]


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("base.vhd", [b"W2ru", b"MacX"]),
        ("./sub dir/base.vhd", [b"W2ru", b"MacX"]),
        ("../b\u00e4se.vhd", [b"W2ru", b"MacX"]),
        ("/images/base.vhd", [b"MacX"]),
        ("back\\slash.vhd", [b"MacX"]),
        ("./co:lon.vhd", [b"W2ru", b"MacX"]),
        ("not-utf-8-\udce4.vhd", [b"MacX"]),
    ],
)
def test_what_is_written_is_read(name: str, codes: list[bytes]) -> None:
    locators, stored = make_locators(name, 4096)
    assert [locator.code for locator in locators] == codes
    assert len(stored) == 512 * len(codes)
    plain = name if ":" in name else name.removeprefix("./")
    for locator in locators:
        at = locator.offset - 4096
        assert decode_name(locator.code, stored[at : at + locator.length]) == plain


def test_too_long() -> None:
    with pytest.raises(ValueError, match="too long"):
        make_locators("x" * 20000, 0)


def test_portable_names() -> None:
    assert portable("D:base.vhd") == "D:base.vhd"
    assert portable("") is None
