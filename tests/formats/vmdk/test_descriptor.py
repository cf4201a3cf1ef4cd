import pytest

from nbdserve.errors import ConfigError, CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.vmdk.descriptor import (
    MAX_EXTENTS,
    MAX_SECTORS,
    NO_PARENT,
    Descriptor,
    ExtentLine,
    build_descriptor,
    with_other_cid,
)

GOOD = b"""# Disk DescriptorFile
version=1
CID=bd5ab15
parentCID=ffffffff
createType="twoGbMaxExtentFlat"

# Extent description
RW 4194304 FLAT "a b-f001.vmdk" 0
RDONLY 2097152 FLAT "a b-f002.vmdk" 63
RW 7 ZERO
  RW  8  SPARSE  "c.vmdk"

ddb.adapterType = "ide"
"""


def test_a_descriptor_is_read() -> None:
    found = Descriptor.parse(GOOD + b"\0CID=1", "x")
    assert (found.cid, found.parent_cid, found.create_type) == (0xBD5AB15, NO_PARENT, "twoGbMaxExtentFlat")
    assert found.parent_name is None
    assert found.extents == (
        ExtentLine("RW", 4194304, "FLAT", "a b-f001.vmdk", 0),
        ExtentLine("RDONLY", 2097152, "FLAT", "a b-f002.vmdk", 63),
        ExtentLine("RW", 7, "ZERO"),
        ExtentLine("RW", 8, "SPARSE", "c.vmdk"),
    )
    assert found.cid_at is not None
    assert GOOD[found.cid_at[0] :][: found.cid_at[1]] == b"bd5ab15"


def test_lines_of_windows_and_spaces_are_read() -> None:
    text = GOOD.replace(b"\n", b"\r\n").replace(b"CID=bd", b"CID = bd").replace(b"createType=", b"CREATETYPE = ")
    found = Descriptor.parse(text, "x")
    assert (found.cid, found.create_type, len(found.extents)) == (0xBD5AB15, "twoGbMaxExtentFlat", 4)


def test_parent_cid_is_not_the_cid() -> None:
    found = Descriptor.parse(b"parentCID=11\nCID=22\n", "x")
    assert (found.cid, found.parent_cid, found.cid_at) == (0x22, 0x11, (17, 2))
    assert Descriptor.parse(b"", "x") == Descriptor()


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("CID=xyz", "CID"),
        ("CID=123456789", "CID"),
        ("parentCID=-1", "parentCID"),
        ('RW 0 FLAT "a" 0', "extent"),
        (f'RW {MAX_SECTORS + 1} FLAT "a" 0', "extent"),
        (f'RW 1 FLAT "a" {MAX_SECTORS + 1}', "extent"),
        ('RW 99999999999999999999999999 FLAT "a" 0', "extent"),
        ('RW -5 FLAT "a" 0', "extent"),
        ('RW 1 FLAT "a"', "extent"),
        ('RW 1 SPARSE "a" 5', "extent"),
        ('RW 1 SPARSE ""', "extent"),
        ("RW 1 SPARSE", "extent"),
        ('RW 1 VMFSRDM "a"', "extent"),
        ('NOACCESS 1 SPARSE "a"', "extent"),
        ("RW", "extent"),
        ("parentFileNameHint=" + "p" * 2000, "parentFileNameHint"),
        ('RW 1 SPARSE "' + "p" * 2000 + '"', "extent"),
    ],
)
def test_a_bad_line_is_refused_by_name_and_value(line: str, field: str) -> None:
    with pytest.raises(ImageError) as caught:
        Descriptor.parse(f"# Disk DescriptorFile\n{line}\n".encode(), "x.vmdk")
    assert caught.value.field == field
    assert caught.value.value is not None


def test_lengths_are_bounded() -> None:
    many = b'RW 1 FLAT "a" 0\n' * (MAX_EXTENTS + 1)
    with pytest.raises(UnsupportedImageError, match="extents"):
        Descriptor.parse(many, "x")
    with pytest.raises(CorruptImageError, match="descriptor size"):
        Descriptor.parse(b"#" * (1 << 20) + b"\n#", "x")


@pytest.mark.parametrize(
    ("lines", "shared"),
    [
        (['RW 8 FLAT "b" 0', 'RW 8 FLAT "b" 8', "RW 9 ZERO", "RW 9 ZERO", 'RW 8 FLAT "c" 4'], None),
        (['RW 8 FLAT "b" 8', 'RW 9 FLAT "b" 0'], 'RW 8 FLAT "b" 8'),
        (['RW 8 SPARSE "b"', 'RW 8 SPARSE "a"', 'RW 8 SPARSE "b"'], 'RW 8 SPARSE "b"'),
        (['RW 8 SPARSE "b"', 'RW 8 FLAT "b" 9999'], 'RW 8 FLAT "b" 9999'),
    ],
)
def test_extents_in_the_same_place_are_found(lines: list[str], shared: str | None) -> None:
    found = Descriptor.parse("\n".join(lines).encode(), "x").shared_extent
    assert (found and found.text()) == shared


def test_a_value_with_a_million_spaces_is_read_at_once() -> None:
    """Neither it nor what stands around it is gone through again and again."""
    spaces = b" " * 300_000
    text = b"parentFileNameHint" + spaces + b"=" + spaces + b"a" + spaces + b"b" + spaces
    with pytest.raises(CorruptImageError, match="at most 1023 bytes"):
        Descriptor.parse(text[: (1 << 20) - 1], "x")
    assert Descriptor.parse(b" createType =  a" + spaces + b"b \n", "x").create_type == "a" + " " * 1022


def test_a_new_cid_takes_the_place_of_the_old_one() -> None:
    assert with_other_cid(b"12345678", 0xABCDEF01) == b"abcdef01"
    assert with_other_cid(b"12345678", 0x12345678) == b"12345679"
    assert with_other_cid(b"0000000f", NO_PARENT) == b"00000000"
    assert with_other_cid(b"fe", 0x1234) == b"34"
    assert with_other_cid(b"f", 0xF) == b"0"


def test_what_is_built_is_read() -> None:
    lines = [ExtentLine("RW", 9, "FLAT", "a.vmdk", 4), ExtentLine("RW", 9, "SPARSE", "b.vmdk")]
    text = build_descriptor(
        cid=0xAB,
        parent_cid=0x12345678,
        create_type="custom",
        parent_name="dir/p \xe4.vmdk",
        extents=lines,
        size=10 << 30,
        adapter_type="lsilogic",
        hw_version="6",
        tools_version="3",
    )
    found = Descriptor.parse(text, "x")
    assert (found.cid, found.parent_cid, found.create_type) == (0xAB, 0x12345678, "custom")
    assert (found.parent_name, list(found.extents)) == ("dir/p \xe4.vmdk", lines)
    assert b'ddb.geometry.heads = "255"' in text


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\0b", "n" * 1024])
def test_names_that_cannot_be_written_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        build_descriptor(
            cid=1,
            parent_cid=2,
            create_type="monolithicSparse",
            parent_name=name,
            extents=[],
            size=512,
            adapter_type="ide",
            hw_version="4",
            tools_version="0",
        )
