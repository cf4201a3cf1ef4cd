from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.raw import RawDriver
from nbdserve.formats.raw_cow.create import mtime_of, plan_header
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.raw_cow.header import read_header
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, MIB, TIB
from tests.formats.raw_cow.engine import Files


async def test_a_new_image_shows_the_backing_file() -> None:
    files = Files(bytes(range(256)) * 4096)
    await files.create(MIB)
    assert (files.image.size, files.raw.size) == (4608, MIB)
    header, _ = await read_header(files.image)
    assert (header.backing_file, header.backing_format, header.raw_file) == ("base", "raw", "vm.img")
    node = await files.node()
    assert await node.read(0, MIB) == files.base


@pytest.mark.parametrize("length", [0, 5, MIB, MIB + 700])
async def test_a_raw_file_that_is_there_keeps_what_it_holds(length: int) -> None:
    content = b"precious"[: length or 8] * (length // 8 + 1)
    files = Files(None)
    await files.raw.write(0, content[:length])
    await files.create(MIB)
    assert files.raw.size == max(length, MIB)
    assert await files.raw.read(0, length) == content[:length]
    assert await files.raw.read(length, MIB) == bytes(MIB)


async def test_whatever_the_image_file_held_is_gone() -> None:
    files = Files(None)
    await files.image.write(0, b"\xff" * 100_000)
    await files.create(MIB, cluster_size="512")
    driver = await files.driver()
    assert driver.bitmap.missing == 2048
    assert files.image.size == 4608
    assert not (await driver.check()).leaks


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "need raw_file"),
        ({"raw_file": ""}, "need raw_file"),
        ({"raw_file": "r", "backing_file": "b"}, "needs backing_fmt"),
        ({"raw_file": "r", "backing_fmt": "raw"}, "needs backing_file"),
        ({"raw_file": "r", "cluster_size": "256"}, "cluster_size=256"),
        ({"raw_file": "r", "cluster_size": "3000"}, "cluster_size=3000"),
        ({"raw_file": "r", "cluster_size": "4M"}, "cluster_size=4194304"),
        ({"raw_file": "r", "cluster_size": "big"}, "cluster_size: invalid size"),
        ({"raw_file": "r", "cluster_size": "512"}, "use a larger cluster_size"),
        ({"raw_file": "r" * 1024}, "raw_file: 1024 bytes"),
        ({"raw_file": "r", "nocow": "on"}, "unknown raw-cow option 'nocow'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RawCowDriver.validate_create(129 * GIB, options)


def test_sizes_are_whole_sectors_and_bounded() -> None:
    assert plan_header(1, {"raw_file": "r"}).size == 512
    assert RawCowDriver.created_size(1, {}) == 512
    assert plan_header(128 * GIB, {"raw_file": "r", "cluster_size": "512"}).bitmap_bytes == 32 * MIB
    assert plan_header(16 * TIB, {"raw_file": "r"}).bitmap_bytes == 32 * MIB
    with pytest.raises(ConfigError):
        plan_header(16 * TIB + 512, {"raw_file": "r"})


async def test_a_failed_write_leaves_no_image() -> None:
    class Failing(MemoryStorage):
        async def flush(self) -> None:
            raise OSError(5, "no")

    files = Files(None)
    files.raw = Failing()  # type: ignore[assignment]
    with pytest.raises(OSError, match="no"):
        await files.create(MIB)
    assert await files.image.read(0, 4) == bytes(4)


async def test_when_the_backing_file_was_changed_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "base"
    path.write_bytes(bytes(512))
    backing = await RawDriver.open(await FileStorage.open(str(path), read_only=True), {}, read_only=True)
    for seconds, stored in ((1311067534, 1311067534), (1 << 31, -(1 << 31)), ((1 << 32) + 5, 5)):
        os.utime(path, (seconds, seconds))
        assert mtime_of(backing) == stored
    path.unlink()
    assert mtime_of(backing) == 0
    assert mtime_of(None) == 0
    await backing.close()
