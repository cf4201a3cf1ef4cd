"""Dirty bitmaps in the Format Extension: both ways, beside QEMU, and damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.parallels import extension, layout
from nbdserve.formats.parallels.driver import ParallelsDriver
from nbdserve.formats.parallels.extension import DirtyBitmap, Extension, Feature
from nbdserve.formats.parallels.layout import Header, plan
from nbdserve.units import KIB, MIB
from tests.cli.processes import greets, until
from tests.formats import flat
from tests.support import images

UNKNOWN = Feature(0x1234, 0, b"hello")
TRANSIT = Feature(0x5678, extension.FLAG_TRANSIT, b"left alone")
NECESSARY = Feature(0x9ABC, extension.FLAG_NECESSARY, b"")
ID = UUID("12345678-9abc-def0-1234-56789abcdef0")


def _bits(count: int, seed: int) -> bytes:
    """Runs of zeroes and ones."""
    rng, bits = random.Random(seed), ""
    while len(bits) < count:
        bits += rng.choice("01") * rng.randrange(1, 40)
    return int(bits[:count][::-1], 2).to_bytes(-(-count // 8), "little")


def _ranges(bits: bytes, count: int, granularity: int, size: int) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for i in range(count):
        if bits[i // 8] >> i % 8 & 1:
            start, end = i * granularity, min((i + 1) * granularity, size)
            if result and sum(result[-1]) == start:
                result[-1] = (result[-1][0], end - result[-1][0])
            else:
                result.append((start, end - start))
    return result


def _image(
    path: Path,
    size: int,
    cluster_size: int,
    granularity: int,
    *features: Feature,
    seed: int = 1,
    l1: tuple[int, ...] | None = None,
    **fields: Any,
) -> tuple[Header, list[tuple[int, int]]]:
    """An image with a dirty bitmap: the extension is the first cluster, those of the bitmap follow."""
    header = plan(size, cluster_size=cluster_size)
    header = dataclasses.replace(header, extension_offset=header.data_offset, **fields)
    count = -(-size // granularity)
    bits = _bits(count, seed)
    places = range(0, len(bits), cluster_size)
    table = tuple((header.data_offset + cluster_size + at) // 512 for at in places)
    for at, entry in zip(places, l1 or (), strict=False):
        bits = bits[:at] + bytes([0xFF * (entry == 1)]) * min(cluster_size, len(bits) - at) + bits[at + cluster_size :]
    bitmap = DirtyBitmap(ID, granularity, l1 or table)
    body = extension.build((extension.build_bitmap(bitmap, header), *features), cluster_size)
    clusters = b"".join(bits[at : at + cluster_size].ljust(cluster_size, b"\0") for at in places)
    path.write_bytes(header.build().ljust(header.data_offset, b"\0") + body + clusters)
    return header, _ranges(bits, count, granularity, size)


async def _open(path: Path, **how: Any) -> ParallelsDriver:
    return await flat.open_with(ParallelsDriver, path, **how)


async def _dirty(driver: ParallelsDriver) -> list[tuple[int, int]]:
    (bitmap,) = driver.extension.bitmaps
    return [found async for found in driver.dirty_ranges(bitmap)]


@pytest.mark.parametrize(
    ("size", "cluster_size", "granularity"),
    [
        (10 * MIB, MIB, 64 * KIB),
        (10 * MIB + 512, MIB, 512),
        (300 * MIB, 512, 64 * KIB),
        (32 * MIB, 63 * 512, 512),
        (100 * MIB + 512, 512, 16 * KIB),
    ],
)
async def test_bitmaps_are_read(tmp_path: Path, size: int, cluster_size: int, granularity: int) -> None:
    _, expected = _image(tmp_path / "a", size, cluster_size, granularity)
    driver = await _open(tmp_path / "a", read_only=True)
    assert [(b.id, b.granularity) for b in driver.extension.bitmaps] == [(ID, granularity)]
    assert await _dirty(driver) == expected
    assert driver.info().specific == {"bitmaps": [{"name": str(ID), "granularity": granularity}]}
    await driver.close()


@pytest.mark.parametrize("l1", [(0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0)])
async def test_clusters_of_equal_bits(tmp_path: Path, l1: tuple[int, ...]) -> None:
    size = 512 * 8 * 512 * 2 + 512 * 100
    _, expected = _image(tmp_path / "a", size, 512, 512, l1=l1)
    driver = await _open(tmp_path / "a", read_only=True)
    assert await _dirty(driver) == expected
    await driver.close()


async def test_an_entry_that_refers_to_no_cluster(tmp_path: Path) -> None:
    for entry in (2, 1 << 40, 3001):
        _image(tmp_path / "a", 10 * MIB, MIB, 64 * KIB, l1=(entry,))
        driver = await _open(tmp_path / "a", read_only=True)
        with pytest.raises(CorruptImageError) as caught:
            await _dirty(driver)
        assert (caught.value.field, caught.value.value) == ("dirty bitmap L1 entry", entry)
        await driver.close()


@images.needs_qemu
@pytest.mark.skipif(not shutil.which("nbdinfo"), reason="nbdinfo is not installed")
@pytest.mark.parametrize(("size", "cluster_size"), [(64 * MIB + 512, MIB), (64 * MIB, 512)])
def test_qemu_sees_the_same_bitmap(tmp_path: Path, size: int, cluster_size: int) -> None:
    """What our layout builds is what QEMU reads: it serves the bitmap, and its clients see our ranges."""
    path, socket = tmp_path / "a", tmp_path / "s"
    _, expected = _image(path, size, cluster_size, 64 * KIB)
    command = ["qemu-nbd", "-r", "-f", "parallels", "-B", str(ID), "-k", str(socket), "-t", str(path)]
    with subprocess.Popen(command) as server:
        try:
            until(lambda: greets(socket), "qemu-nbd answers")
            context = f"qemu:dirty-bitmap:{ID}"
            out = images.run("nbdinfo", "--json", f"--map={context}", f"nbd+unix:///?socket={socket}")
        finally:
            server.terminate()
    assert [(run["offset"], run["length"]) for run in json.loads(out) if run["type"]] == expected


async def test_a_change_drops_the_bitmaps(tmp_path: Path) -> None:
    _image(tmp_path / "a", 10 * MIB, MIB, 64 * KIB)
    before = (tmp_path / "a").read_bytes()
    driver = await _open(tmp_path / "a")
    assert driver.extension.bitmaps
    await flat.read(driver, 0, 10 * MIB)
    await driver.close()
    assert (tmp_path / "a").read_bytes() == before
    driver = await _open(tmp_path / "a")
    await flat.write(driver, 0, b"x")
    assert not driver.extension.bitmaps
    await driver.close()
    driver = await _open(tmp_path / "a", read_only=True)
    assert driver.header.extension_offset == 0 and driver.extension == Extension()
    assert (tmp_path / "a").stat().st_size == 2 * MIB
    await driver.close()


async def test_unknown_features(tmp_path: Path) -> None:
    path = tmp_path / "a"
    _image(path, 10 * MIB, 64 * KIB, 64 * KIB, UNKNOWN, TRANSIT)
    driver = await _open(path)
    assert driver.extension.unknown == (UNKNOWN, TRANSIT) and driver.extension.bitmaps
    size = path.stat().st_size
    await flat.write(driver, 5, b"x")
    await driver.close()
    driver = await _open(path, read_only=True)
    assert driver.extension == Extension((), (TRANSIT,))
    assert driver.header.extension_offset == size
    assert path.stat().st_size == size + 2 * 64 * KIB  # nobody knows where it has its clusters: none was reused
    assert await flat.read(driver, 0, 10) == b"\0\0\0\0\0x\0\0\0\0"
    await driver.close()


async def test_a_necessary_feature_forbids_changes(tmp_path: Path) -> None:
    _image(tmp_path / "a", 10 * MIB, MIB, 64 * KIB, NECESSARY)
    with pytest.raises(UnsupportedImageError, match="0x9abc of the extension is not known, and forbids"):
        await _open(tmp_path / "a")
    driver = await _open(tmp_path / "a", read_only=True)
    assert driver.extension.bitmaps
    await driver.close()


@pytest.mark.parametrize("in_use", [layout.IN_USE, layout.CLOSED_BY_OLD])
async def test_an_extension_nobody_kept_is_not_trusted(tmp_path: Path, in_use: int) -> None:
    _image(tmp_path / "a", 10 * MIB, MIB, 64 * KIB, in_use=in_use)
    driver = await _open(tmp_path / "a", read_only=True)
    assert driver.extension == Extension()
    await driver.close()


@pytest.mark.parametrize(
    ("at", "patch", "why"),
    [
        (0, b"\0", "wrong magic"),
        (8, b"\0", "wrong checksum"),
        (900, b"\1", "wrong checksum"),
    ],
)
async def test_a_damaged_extension_is_ignored(
    tmp_path: Path, at: int, patch: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    header, _ = _image(tmp_path / "a", 10 * MIB, MIB, 64 * KIB)
    with (tmp_path / "a").open("r+b") as file:
        file.seek(header.data_offset + at)
        file.write(patch)
    with caplog.at_level(logging.WARNING):
        driver = await _open(tmp_path / "a", read_only=True)
    assert driver.extension == Extension()
    assert "damaged and ignored" in caplog.text and why in caplog.text
    await driver.close()


@pytest.mark.parametrize("offset", [512, MIB + 512, 1 << 62, 9 * MIB])
async def test_an_extension_outside_the_file(tmp_path: Path, offset: int, caplog: pytest.LogCaptureFixture) -> None:
    _image(tmp_path / "a", 10 * MIB, MIB, 64 * KIB)
    with (tmp_path / "a").open("r+b") as file:
        file.seek(56)
        file.write(struct.pack("<Q", offset // 512))
    driver = await _open(tmp_path / "a", read_only=True)
    assert driver.extension == Extension() and "there is no such cluster" in caplog.text
    await driver.close()


def _feature(header: Header, at: int, width: str, value: int) -> Feature:
    feature = extension.build_bitmap(DirtyBitmap(ID, 64 * KIB, (0,)), header)
    data = bytearray(feature.data)
    struct.pack_into(width, data, at, value)
    return dataclasses.replace(feature, data=bytes(data))


@pytest.mark.parametrize(
    ("at", "width", "value", "why"),
    [
        (0, "<Q", 1, "of a disk of 1 sectors"),
        (24, "<I", 0, "granularity 0"),
        (24, "<I", 3, "granularity 3"),
        (28, "<I", 0, "with 0 clusters"),
        (28, "<I", 0xFFFFFFFF, "with 4294967295 clusters"),
    ],
)
def test_bitmaps_that_make_no_sense(at: int, width: str, value: int, why: str) -> None:
    header = plan(10 * MIB)
    with pytest.raises(ValueError, match=why):
        extension.parse(extension.build((_feature(header, at, width, value),), 4096), header)


def test_features_that_reach_too_far() -> None:
    header = plan(10 * MIB)
    short = Feature(extension.FEATURE_DIRTY_BITMAP, 0, b"x" * 8)
    with pytest.raises(ValueError, match="a dirty bitmap of 8 bytes"):
        extension.parse(extension.build((short,), 4096), header)
    tableless = extension.build_bitmap(DirtyBitmap(ID, 64 * KIB, (0,)), header)
    tableless = dataclasses.replace(tableless, data=tableless.data[:-1])
    with pytest.raises(ValueError, match="a part of its table"):
        extension.parse(extension.build((tableless,), 4096), header)
    many = (Feature(7, 0, b""),) * (extension.MAX_FEATURES + 1)
    with pytest.raises(ValueError, match="more than 1024 features"):
        extension.parse(extension.build(many, MIB), header)
    with pytest.raises(ValueError, match="do not fit"):
        extension.build((Feature(7, 0, bytes(480)),), 512)
    for body in (
        extension.FEATURE.build({"magic": 7, "flags": 0, "data_size": 9000, "unused": 0}),
        b"\1" * 4000,
    ):
        cluster = extension.build((), 4096)[24:]
        cluster = body + cluster[len(body) :]
        head = extension.HEAD.build({"magic": extension.MAGIC, "checksum": hashlib.md5(cluster).digest()})
        with pytest.raises(ValueError, match=r"reaches past|no end of features"):
            extension.parse(head + cluster, header)


async def test_a_cluster_too_large_to_look_at(tmp_path: Path) -> None:
    header = plan(64 * MIB, cluster_size=32 * MIB)
    header = dataclasses.replace(header, extension_offset=header.data_offset)
    (tmp_path / "a").write_bytes(header.build())
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(64 * MIB)
    with pytest.raises(CorruptImageError) as caught:
        await _open(tmp_path / "a", read_only=True)
    assert caught.value.field == "ext_off"
