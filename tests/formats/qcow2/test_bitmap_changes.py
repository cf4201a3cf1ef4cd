"""Bitmaps that we store: read by others, in step with the size, without leaks, whatever the image claims to hold."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.errors import ConfigError, ImageError, RequestError
from nbdserve.formats.base import BitmapInfo
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.image import read_header
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.formats.qcow2.engine import bits_of, check, create, directory_of, mark_in_use, open_image, qemu_io, run
from tests.support.images import needs_qemu

pytestmark = needs_qemu

ROUNDS = int(os.environ.get("NBDSERVE_BITMAP_ROUNDS", "3"))
FUZZED = int(os.environ.get("NBDSERVE_BITMAP_FUZZ", "150"))


def some_bitmap(rng: random.Random, name: str, size: int) -> DirtyBitmap:
    """Of any granularity; empty, full, or with some runs."""
    bitmap = DirtyBitmap(name, size, 512 << rng.randrange(12))
    bitmap.disabled = rng.random() < 0.3
    if rng.random() < 0.2:
        bitmap.set(0, size)
    for _ in range(rng.choice((0, 1, 30))):
        offset = rng.randrange(size)
        bitmap.set(offset, min(size - offset, rng.randrange(1, 1 << rng.randrange(1, 24))))
    return bitmap


async def stored(driver: Qcow2Driver) -> dict[str, DirtyBitmap]:
    found = {}
    for info in await driver.stored_bitmaps() or ():
        bitmap = await driver.stored_bitmap(info.name)
        assert bitmap is not None
        found[info.name] = bitmap
    return found


def dirty(bitmap: DirtyBitmap) -> list[dict[str, object]]:
    """As nbdinfo shows it."""
    starts, values, end = bitmap.runs(0, bitmap.size, 1 << 20)
    ends = [*starts.tolist()[1:], end]
    return [
        {"offset": start, "length": stop - start, "type": int(value), "description": ("clean", "dirty")[value]}
        for start, stop, value in zip(starts.tolist(), ends, values.tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_others_read_what_is_stored(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = 512 * rng.randrange(1, 80 * MIB // 512)
    options = rng.choice(("cluster_size=512", "cluster_size=4k", "cluster_size=64k,extended_l2=on"))
    path = create(tmp_path / "a.qcow2", size, options)
    model: dict[str, DirtyBitmap] = {}
    for _ in range(4):
        changes: dict[str, DirtyBitmap | None] = {}
        for name in rng.sample("abcdé", rng.randrange(1, 4)):
            changes[name] = None if rng.random() < 0.3 else some_bitmap(rng, name, size)
        driver = await open_image(path, keep_bitmaps=True)
        await driver.store_bitmaps(changes)
        await driver.close()
        model = {name: found for name, found in (model | changes).items() if found is not None}
        check(path)
        driver = await open_image(path, read_only=True)
        again = await stored(driver)
        assert {name: (each.bits, each.disabled) for name, each in again.items()} == {
            name: (each.bits, each.disabled) for name, each in model.items()
        }
        await driver.close()
    for name, bitmap in list(model.items())[:1]:
        assert bits_of(path, name) == dirty(bitmap)
    for name in model:  # who stores them anew reads all of them, and gives our clusters back
        run("qemu-img", "bitmap", "--merge", name, path, name)
    check(path)


async def test_a_cluster_of_bits_that_are_alike_takes_no_space(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "64M", "cluster_size=512")
    driver = await open_image(path, keep_bitmaps=True)
    sizes = []
    for filled in (0, 64 * MIB, 65 * KIB):
        bitmap = DirtyBitmap("b", 64 * MIB, 512)
        if filled:
            bitmap.set(0, filled)
        await driver.store_bitmaps({"b": bitmap})
        taken = await driver.check()
        assert (taken.leaks, taken.corruptions) == (0, 0)
        sizes.append(sum([await driver.refcounts.count(cluster) for cluster in range(driver.storage.size // 512)]))
    assert sizes == [sizes[0], sizes[0], sizes[0] + 1]
    await driver.close()


async def test_what_is_not_named_stays_where_it_is(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    for name in ("a", "b", "c"):
        run("qemu-img", "bitmap", "--add", path, name)
    qemu_io(path, "write 1M 64k")
    mark_in_use(path, "b")
    driver = await open_image(path, keep_bitmaps=True)
    await driver.store_bitmaps({"absent": None})
    await driver.store_bitmaps({"a": DirtyBitmap("a", 8 * MIB, 4 * KIB), "d": DirtyBitmap("d", 8 * MIB)})
    assert await driver.stored_bitmaps() == [
        BitmapInfo("a", 4 * KIB, in_use=False, auto=True),
        BitmapInfo("b", 64 * KIB, in_use=True, auto=True),
        BitmapInfo("c", 64 * KIB, in_use=False, auto=True),
        BitmapInfo("d", 64 * KIB, in_use=False, auto=True),
    ]
    await driver.close()
    check(path)
    assert next(extent for extent in bits_of(path, "c") if extent["type"])["offset"] == MIB


async def test_the_size_takes_them_along(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "3M", "cluster_size=4k")
    driver = await open_image(path, keep_bitmaps=True)
    bitmap = DirtyBitmap("b", 3 * MIB, 512)
    bitmap.set(MIB, 2 * KIB)
    await driver.store_bitmaps({"b": bitmap})
    for size in (40 * MIB, 2 * MIB, 2 * MIB + 512):
        await driver.resize(size)
        bitmap.resize(size)
        assert (await stored(driver))["b"].bits == bitmap.bits
    await driver.close()
    check(path)
    mark_in_use(path, "b")
    driver = await open_image(path, keep_bitmaps=True)
    with pytest.raises(ConfigError, match="Bitmap 'b' is inconsistent and cannot be used"):
        await driver.resize(4 * MIB)
    await driver.close()
    check(path)


async def test_of_an_image_in_use_those_that_do_not_record_follow_the_size(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "3M", "cluster_size=512")
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "recording")
    run("qemu-img", "bitmap", "--add", "--disable", "-g", "512", path, "resting")
    driver = await open_image(path)
    await driver.resize(30 * MIB)
    await driver.close()
    check(path)
    driver = await open_image(path, read_only=True)
    found = await stored(driver)
    assert (found["recording"].inconsistent, found["resting"].inconsistent) == (True, False)
    assert found["resting"].next_dirty(0) == 3 * MIB
    await driver.close()


async def test_what_cannot_be_stored(tmp_path: Path) -> None:
    driver = await open_image(create(tmp_path / "v2", "1M", "compat=0.10"), keep_bitmaps=True)
    assert await driver.stored_bitmaps() is None
    with pytest.raises(ConfigError, match=r"'b' persistent in .*: Cannot store dirty bitmaps in qcow2 v2 files"):
        await driver.check_new_bitmap(DirtyBitmap("b", MIB))
    await driver.close()
    driver = await open_image(create(tmp_path / "empty", 0), keep_bitmaps=True)
    with pytest.raises(ConfigError, match="no size"):
        await driver.check_new_bitmap(DirtyBitmap("b", 0))
    await driver.close()


async def test_without_space_all_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    driver = await open_image(path, keep_bitmaps=True)
    await driver.store_bitmaps({"a": DirtyBitmap("a", 8 * MIB)})

    async def full(offset: int, data: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(driver.storage, "write", full)
        await driver.store_bitmaps({"a": None, "b": DirtyBitmap("b", 8 * MIB)})
    assert list(await stored(driver)) == ["a"]
    await driver.close()
    check(path)


async def test_the_extension_is_in_the_first_sector_and_names_of_features_stay(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    run("qemu-img", "bitmap", "--add", path, "b")
    driver = await open_image(path, keep_bitmaps=True)
    names, _ = driver.header.extensions
    await driver.store_bitmaps({"b": DirtyBitmap("b", 8 * MIB)})
    await driver.close()
    header, sector = await read_header(MemoryStorage(path.read_bytes()))
    assert header.extensions[1] == names
    assert header.bitmaps is not None
    assert directory_of(sector)[0] == header.bitmaps.directory_offset


async def test_whatever_the_image_claims_to_hold(tmp_path: Path) -> None:
    """No worse than an error or an image with other errors: bytes of directory and tables are changed at random."""
    path = create(tmp_path / "a.qcow2", "1M", "cluster_size=512")
    for name in ("a", "b"):
        run("qemu-img", "bitmap", "--add", "-g", "512", path, name)
    qemu_io(path, "write 100k 100k")
    content = path.read_bytes()
    directory, length = directory_of(content)
    tables = [int.from_bytes(content[at : at + 8], "big") for at in range(directory, directory + length, length // 2)]
    outcomes = set()
    for seed in range(FUZZED):
        rng, changed = random.Random(seed), bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            start, span = rng.choice(((directory, length), *((table, 16) for table in tables)))
            at = start + rng.randrange(span)
            changed[at : at + 1] = rng.choice((b"\0", b"\xff", rng.randbytes(1)))
        storage = MemoryStorage(bytes(changed))
        try:
            driver = await Qcow2Driver.open(storage, {"keep_bitmaps": True}, read_only=False)
            await driver.store_bitmaps({rng.choice("ab"): rng.choice((None, DirtyBitmap("a", MIB)))})
            await driver.resize(2 * MIB)
            await stored(driver)
            outcomes.add("done")
        except (ConfigError, ImageError, RequestError) as error:
            outcomes.add(type(error).__name__)
        assert storage.size < 2 * MIB
    assert {"done", "CorruptImageError", "UnsupportedImageError"} <= outcomes
