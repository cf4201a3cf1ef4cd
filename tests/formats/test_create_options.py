from __future__ import annotations

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.create_options import parse_backing, parse_boolean


def test_switches() -> None:
    assert [parse_boolean({"x": word}, "x") for word in ("on", "y", "off", "n")] == [True, True, False, False]
    assert [parse_boolean({}, "x"), parse_boolean({}, "x", "on")] == [False, True]
    with pytest.raises(ConfigError, match="x=ON: expects on or off"):
        parse_boolean({"x": "ON"}, "x")


def test_a_backing_file_and_its_format_come_together() -> None:
    assert parse_backing({}) is None
    assert parse_backing({"backing_file": "", "backing_fmt": ""}) is None
    assert parse_backing({"backing_file": "base", "backing_fmt": "raw"}) == ("base", "raw")
    with pytest.raises(ConfigError, match="backing_file needs backing_fmt"):
        parse_backing({"backing_file": "base"})
    with pytest.raises(ConfigError, match="backing_fmt needs backing_file"):
        parse_backing({"backing_fmt": "raw"})
