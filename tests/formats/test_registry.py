import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.registry import DRIVERS, driver_for


def test_drivers_are_found_by_their_own_names() -> None:
    for name in DRIVERS:
        assert driver_for(name).name == name


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'nonsense'.*qcow2,.* raw"):
        driver_for("nonsense")
