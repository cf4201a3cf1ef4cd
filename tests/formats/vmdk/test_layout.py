from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ImageError
from nbdserve.formats.vmdk import layout
from nbdserve.formats.vmdk.layout import HEADER, build_hosted, parse_hosted, plan_hosted
from nbdserve.units import GIB, KIB, MIB, SECTOR_SIZE, TIB

SIZE = 5 * GIB
FILE = 1 << 20


def header(**changes: Any) -> bytes:
    sector = build_hosted(plan_hosted(SIZE), compressed=False, zeroed_grains=True)
    fields = dict(HEADER.parse(sector))
    fields.pop("_io", None)
    data: bytes = HEADER.build(fields | changes)
    return data


def test_a_new_header_has_qemus_places() -> None:
    """The figures are those of qemu-img 7.2 for 5 GiB."""
    plan = plan_hosted(SIZE)
    found = parse_hosted(header(), "x", FILE)
    assert plan.redundant_offset == found.redundant_offset == 0x15 * SECTOR_SIZE
    assert plan.directory_offset == found.directory_offset == 0x297 * SECTOR_SIZE
    assert plan.overhead == found.overhead == 0x580 * SECTOR_SIZE
    assert (found.capacity, found.grain_size, found.table_entries) == (SIZE, 64 * KIB, 512)
    assert (found.directory_entries, found.coverage) == (160, 32 * MIB)
    assert (found.version, found.zeroed_grains, found.compressed, found.unclean) == (2, True, False, False)
    assert (found.descriptor_offset, found.descriptor_size) == (512, 10240)


@given(st.integers(1, 64 * TIB // SECTOR_SIZE))
def test_the_parts_of_an_extent_do_not_overlap(sectors: int) -> None:
    plan = plan_hosted(sectors * SECTOR_SIZE)
    assert plan.directory_entries * 32 * MIB >= plan.capacity
    places = [512 + 20 * 512, plan.redundant_offset, plan.redundant_tables, plan.directory_offset, plan.tables]
    ends = [512, plan.redundant_offset + plan.directory_entries * 4]
    assert places == sorted(places)
    assert ends[1] <= plan.redundant_tables
    assert plan.redundant_tables + plan.directory_entries * 2048 <= plan.directory_offset
    assert plan.tables + plan.directory_entries * 2048 <= plan.overhead
    assert plan.overhead % plan.grain_size == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"magic": b"KDMX"}, "magic"),
        ({"version": 0}, "version"),
        ({"version": 4}, "version"),
        ({"newlines": b"\n \n\n"}, "newline detection"),
        ({"compression": 2}, "compressAlgorithm"),
        ({"grain_size": 0}, "grainSize"),
        ({"grain_size": 100}, "grainSize"),
        ({"grain_size": 1 << 16}, "grainSize"),
        ({"table_entries": 0}, "numGTEsPerGT"),
        ({"table_entries": 513}, "numGTEsPerGT"),
        ({"table_entries": 1024}, "numGTEsPerGT"),
        ({"capacity": 1 << 60}, "capacity"),
        ({"capacity": 1 << 40}, "capacity"),
        ({"directory_offset": 0}, "gdOffset"),
        ({"directory_offset": FILE // SECTOR_SIZE}, "gdOffset"),
        ({"redundant_offset": 1 << 62}, "rgdOffset"),
        ({"overhead": FILE // SECTOR_SIZE + 1}, "overHead"),
        ({"descriptor_size": 1 << 50}, "descriptorOffset"),
    ],
)
def test_a_bad_field_is_refused_by_name_and_value(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_hosted(header(**changes), "x.vmdk", FILE)
    assert caught.value.field == field
    assert "x.vmdk" in str(caught.value)


def test_a_field_that_is_not_in_use_is_not_judged() -> None:
    found = parse_hosted(header(flags=0, newlines=bytes(4), redundant_offset=1 << 62), "x", FILE)
    assert found.redundant_offset == 0
    assert parse_hosted(header(capacity=0, grain_size=7, directory_offset=0), "x", FILE).capacity == 0


@given(st.binary(max_size=600))
def test_any_bytes_are_a_header_or_an_image_error(data: bytes) -> None:
    for parse in (parse_hosted, layout.parse_cowd):
        for magic in (layout.KDMV, layout.COWD):
            with pytest.raises(ImageError):
                parse(data, "x", 1)
            try:
                parse(magic + data, "x", 1 << 40)
            except ImageError as error:
                assert error.field is not None


def test_a_footer_is_found_between_its_markers() -> None:
    sector = header()
    marker = layout.MARKER.build({"value": 1, "size": 0, "type": layout.MARKER_FOOTER})
    end = bytes(SECTOR_SIZE)
    assert layout.parse_footer(marker + sector + end, "x") == sector
    assert layout.wants_footer(header(directory_offset=layout.DIRECTORY_AT_END), "x")
    assert not layout.wants_footer(sector, "x")
    for tail in (end + sector + end, marker + end + end, marker + sector + marker):
        with pytest.raises(ImageError) as caught:
            layout.parse_footer(tail, "x")
        assert caught.value.field == "footer"
