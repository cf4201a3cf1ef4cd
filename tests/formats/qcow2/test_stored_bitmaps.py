"""Bitmaps that qemu-img stored, and those that nobody could have stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.image import read_header
from nbdserve.formats.qcow2.stored_bitmaps import read_stored_bitmap
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.support.images import needs_qemu, qemu_io, run

pytestmark = needs_qemu

SIZE = 64 * MIB + 3 * KIB
DIRTY_HERE = ((0, 1), (5 * MIB, 100 * KIB), (SIZE - 1024, 1024))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """``fine`` takes several clusters of which one is all dirty; ``coarse`` is disabled; the name of one is foreign."""
    path = tmp_path_factory.mktemp("stored") / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(SIZE))
    for name, granularity in (("fine", "512"), ("coarse", "1M"), ("späte", "64k")):
        run("qemu-img", "bitmap", "--add", "-g", granularity, path, name)
    for offset, length in DIRTY_HERE:
        qemu_io(path, "qcow2", [f"write {offset} {length}"])
    qemu_io(path, "qcow2", ["write -z 16M 16M"])
    run("qemu-img", "bitmap", "--disable", path, "coarse")
    qemu_io(path, "qcow2", ["write 60M 512"])
    return path.read_bytes()


async def read(content: bytes, name: str) -> DirtyBitmap | None:
    storage = MemoryStorage(content)
    header, _ = await read_header(storage)
    return await read_stored_bitmap(storage, header, name)


@pytest.mark.parametrize(("name", "granularity"), [("fine", 512), ("coarse", MIB), ("späte", 64 * KIB)])
async def test_what_was_dirty_is(image: bytes, name: str, granularity: int) -> None:
    bitmap = await read(image, name)
    assert bitmap is not None
    assert (bitmap.size, bitmap.granularity, bitmap.disabled) == (SIZE, granularity, name == "coarse")
    assert bitmap.persistent
    assert bitmap.read_only
    assert not bitmap.inconsistent
    expected = DirtyBitmap("x", SIZE, granularity)
    for offset, length in (*DIRTY_HERE, (16 * MIB, 16 * MIB), *(() if name == "coarse" else ((60 * MIB, 512),))):
        expected.set(offset, length)
    assert bitmap.bits == expected.bits


async def test_of_one_in_use_the_table_may_have_any_size_that_qemu_reads(image: bytes) -> None:
    entry = _directory(image)
    in_use = _patched(image, entry + 12, 3, 4)
    bitmap = await read(_patched(in_use, entry + 8, 3, 4), "fine")
    assert bitmap is not None
    assert bitmap.inconsistent
    many = _patched(in_use, entry + 8, (512 << 20 >> 12) + 1, 4)
    with pytest.raises(ImageError, match="table size"):
        await read(many.ljust(64 << 20, b"\0"), "fine")


async def test_there_is_no_other(image: bytes) -> None:
    assert await read(image, "fin") is None


async def test_an_autoclear_bit_that_is_gone_means_no_bitmaps(image: bytes) -> None:
    assert await read(image[:88] + bytes(8) + image[96:], "fine") is None


def _directory(content: bytes) -> int:
    """Where the first entry, which is of ``fine``, begins."""
    at = content.index(b"\x23\x85\x28\x75") + 8
    return int.from_bytes(content[at + 16 : at + 24], "big")


def _patched(content: bytes, at: int, value: int, length: int) -> bytes:
    return content[:at] + value.to_bytes(length, "big") + content[at + length :]


async def test_one_in_use_is_inconsistent(image: bytes) -> None:
    bitmap = await read(_patched(image, _directory(image) + 12, 3, 4), "fine")
    assert bitmap is not None
    assert bitmap.inconsistent
    assert bitmap.count() == 0


@pytest.mark.parametrize(
    ("at", "length", "value", "problem"),
    [
        (0, 8, 0x1001, "table offset"),
        (0, 8, 1 << 50, "table offset"),
        (8, 4, 3, "table size"),
        (8, 4, 0xFFFF_FFFF, "table size"),
        (12, 4, 1 << 5, "flags"),
        (16, 1, 2, "type"),
        (17, 1, 8, "granularity"),
        (17, 1, 255, "granularity"),
        (17, 1, 31, "table size"),
    ],
)
async def test_damaged_entries(image: bytes, at: int, length: int, value: int, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        await read(_patched(image, _directory(image) + at, value, length), "fine")


@pytest.mark.parametrize("word", [1 << 60, 0x1000 | 1, 0x1200, 1 << 50])
async def test_damaged_tables(image: bytes, word: int) -> None:
    entry = _directory(image)
    table = int.from_bytes(image[entry : entry + 8], "big")
    with pytest.raises(ImageError, match="table entry 0"):
        await read(_patched(image, table, word, 8), "fine")


async def test_a_driver_knows_them(image: bytes, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(image)
    driver = await Qcow2Driver.open(await FileStorage.open(str(tmp_path / "disk"), read_only=True), {}, read_only=True)
    bitmap = await driver.stored_bitmap("fine")
    assert bitmap is not None
    assert bitmap.count()
    await driver.close()
