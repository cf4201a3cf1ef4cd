"""What the contract says of a driver that says nothing itself, and which methods count as capabilities."""

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from tests.formats.parts import PartsDriver


async def test_a_driver_without_other_files_has_none() -> None:
    assert list(await RawDriver.companions(MemoryStorage())) == []
    assert list(RawDriver.created_companions("i", 512, {})) == []
    assert RawDriver.created_size(513, {}) == 513


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"backing_file": "b"}, "raw images have no backing file"),
        ({"backing_fmt": "raw"}, "raw images have no backing file"),
        ({"cluster_size": "4k"}, "unknown raw option 'cluster_size'"),
    ],
)
def test_option_names_are_checked(options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RawDriver.validate_create(512, options)


def test_defining_a_method_is_what_makes_the_capability_true() -> None:
    assert [name for name in ("create", "check", "allocate", "companions", "resize") if Qcow2Driver.can(name)] == [
        "create",
        "check",
        "allocate",
        "companions",
        "resize",
    ]
    assert RawDriver.can("create")
    assert RawDriver.can("resize")
    assert not RawDriver.can("check")
    assert PartsDriver.can("accept_backing")
    assert not RawDriver.can("accept_backing")
