"""raw: the window of a file as a disk."""

from __future__ import annotations

from typing import Any

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import DATA, ZERO
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import PAGE_SIZE, MemoryStorage
from nbdserve.units import MIB, TIB


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 10_000), ({"offset": 512}, 9488), ({"offset": 512, "size": 1000}, 1000), ({"offset": 10_000}, 0)],
)
async def test_the_disk_is_the_window(options: dict[str, Any], size: int) -> None:
    raw = await RawDriver.open(MemoryStorage(bytes(10_000)), options, read_only=True)
    start = options.get("offset", 0)
    assert raw.size == size
    assert raw.lookup(7, 100) == (DATA, 100, start + 7)
    assert raw.lookup_writable(7, 100) == (DATA, 100, start + 7)
    assert raw.info().virtual_size == size


@pytest.mark.parametrize(
    ("options", "field"),
    [({"offset": 10_001}, "offset"), ({"size": 10_001}, "size"), ({"offset": 1, "size": 10_000}, "size")],
)
async def test_a_window_outside_the_file_is_refused_by_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ImageError) as caught:
        await RawDriver.open(MemoryStorage(bytes(10_000), path="disk.img"), options, read_only=True)
    assert caught.value.field == field
    assert str(caught.value).startswith("disk.img: ")


async def test_holes_of_the_file_are_zero_runs_of_the_window() -> None:
    storage = MemoryStorage(size=4 * PAGE_SIZE)
    await storage.write(PAGE_SIZE, b"x")
    raw = await RawDriver.open(storage, {"offset": PAGE_SIZE // 2}, read_only=True)
    runs = [
        row
        async for piece in raw.iter_runs(100, raw.size)
        for row in zip(piece.start.tolist(), piece.length.tolist(), piece.kind.tolist(), strict=True)
    ]
    half = PAGE_SIZE // 2
    assert runs == [(100, half - 100, ZERO), (half, PAGE_SIZE, DATA), (half + PAGE_SIZE, 2 * PAGE_SIZE, ZERO)]


async def test_a_sparse_file_of_ten_terabytes_is_one_run() -> None:
    raw = await RawDriver.open(MemoryStorage(size=10 * TIB), {}, read_only=True)
    pieces = [piece async for piece in raw.iter_runs(0, raw.size)]
    assert [(piece.length.tolist(), piece.kind.tolist()) for piece in pieces] == [([10 * TIB], [ZERO])]


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
async def test_created_images_have_their_size(preallocation: str) -> None:
    storage = MemoryStorage()
    size = 3 * MIB + 512
    await RawDriver.create(storage, size, {"preallocation": preallocation})
    assert storage.size == size
    assert await storage.read(0, size) == bytes(size)
    assert (storage.allocated_size() > 0) == (preallocation == "full")


async def test_an_unknown_preallocation_is_refused() -> None:
    with pytest.raises(ConfigError, match="preallocation=metadata"):
        await RawDriver.create(MemoryStorage(), MIB, {"preallocation": "metadata"})


@pytest.mark.parametrize("read_only", [False, True])
async def test_closing_flushes_what_is_writable_and_releases_the_file(read_only: bool) -> None:
    calls: list[str] = []

    class Watched(MemoryStorage):
        async def flush(self) -> None:
            calls.append("flush")
            raise OSError(5, "no")

        async def close(self) -> None:
            calls.append("close")

    raw = await RawDriver.open(Watched(bytes(512)), {}, read_only=read_only)
    if read_only:
        await raw.close()
        assert calls == ["close"]
    else:
        with pytest.raises(OSError, match="no"):
            await raw.close()
        assert calls == ["flush", "close"]


def test_capabilities_are_what_is_defined() -> None:
    assert RawDriver.can("create")
    assert RawDriver.can("lookup_writable")
    assert not RawDriver.can("allocate")
    assert not RawDriver.can("check")
    assert not RawDriver.can("discard")


async def test_resize_is_for_whole_files() -> None:
    storage = MemoryStorage(b"x" * 1000)
    driver = await RawDriver.open(storage, {}, read_only=False)
    for size in (3000, 500, 512):
        await driver.resize(size)
        assert (driver.size, storage.size) == (size, size)
    assert await storage.read(0, 512) == b"x" * 500 + bytes(12)
    for options in ({"offset": 100}, {"size": 100}):
        window = await RawDriver.open(storage, options, read_only=False)
        with pytest.raises(ConfigError, match="window"):
            await window.resize(1000)
    assert storage.size == 512
