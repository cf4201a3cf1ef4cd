"""The README's table of formats is what the drivers say, and what they say is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.formats.capabilities import COLUMNS, capabilities, table
from nbdserve.formats.registry import DRIVERS
from tests.formats.parts import PartsDriver

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- python -m nbdserve.formats.capabilities -->\n"


def test_the_table_in_the_readme_is_the_one_the_drivers_make() -> None:
    before, found, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    assert found, "the table begins after this comment"
    assert before
    assert rest.partition("\n\n")[0] + "\n" == table()


def test_a_row_says_what_the_driver_defines() -> None:
    row = dict(zip(COLUMNS, capabilities(PartsDriver), strict=True))
    assert row == {
        "format": "parts",
        "read": "yes",
        "write": "yes",
        "create": "yes",
        "check": "",
        "repair": "",
        "backing": "",
        "rebase": "",
        "resize": "",
    }
    raw = dict(zip(COLUMNS, capabilities(DRIVERS["raw"]), strict=True))
    assert (raw["resize"], raw["check"], raw["backing"]) == ("yes", "", "")
    assert dict(zip(COLUMNS, capabilities(DRIVERS["qcow2"]), strict=True))["backing"] == "any format"


@pytest.mark.parametrize("name", DRIVERS)
def test_who_makes_images_with_a_backing_file_has_one(name: str) -> None:
    driver = DRIVERS[name]
    if driver.can("create"):
        named = "backing_file" in {option.name for option in driver.create_options}
        assert named == (driver.backing_formats != ())
