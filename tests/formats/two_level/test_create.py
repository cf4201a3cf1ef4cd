"""What making a QED and a qcow image has in common."""

from __future__ import annotations

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.two_level.create import parse_preallocation, write_empty
from tests.support.recording import ByteStorage


def test_preallocation() -> None:
    assert [parse_preallocation(options) for options in ({}, {"preallocation": "full"})] == ["off", "full"]
    with pytest.raises(ConfigError, match="preallocation=metadata: expects one of off, falloc, full"):
        parse_preallocation({"preallocation": "metadata"})


class Device(ByteStorage):
    """Keeps its size, and what it holds."""

    grows_zeroed = False

    async def truncate(self, size: int) -> None:
        """Nothing can be done."""


@pytest.mark.parametrize("kind", [ByteStorage, Device])
async def test_nothing_of_what_the_file_held_is_left(kind: type[ByteStorage]) -> None:
    storage = kind(b"junk" * 1000)
    await write_empty(storage, b"header", 3000, "off")
    assert storage.content[:3000] == b"header".ljust(3000, b"\0")
