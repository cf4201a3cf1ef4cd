"""Opening, feature bits, and images whose tables lie."""

from __future__ import annotations

import asyncio
import errno
import struct
from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError, ImageError, RequestError
from nbdserve.formats.base import BitmapInfo
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.layout import COPIED, OFFSET_MASK
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from tests.formats.qcow2.engine import change, check, content, create, mapping, open_image, qemu_io, read, run, write


def _patch(path: Path, at: int, form: str, *values: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, *values))


def _u64(path: Path, at: int) -> int:
    with path.open("rb") as file:
        file.seek(at)
        value: int = struct.unpack(">Q", file.read(8))[0]
        return value


def _l1_offset(path: Path) -> int:
    return _u64(path, 40)


def _l2_offset(path: Path) -> int:
    return _u64(path, _l1_offset(path)) & OFFSET_MASK


async def test_a_read_only_open_changes_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M", "lazy_refcounts=on")
    qemu_io(path, "write -P 1 0 1M")
    _patch(path, 72, ">QQQ", 0b1, 0xF0, 0xFF0)
    before = path.read_bytes()
    driver = await open_image(path, read_only=True)
    assert (await read(driver, 0, 1 << 20)) == b"\1" * (1 << 20)
    assert driver.info().dirty
    await driver.close()
    assert path.read_bytes() == before


async def test_a_table_that_is_read_while_the_tables_are_replaced_is_not_kept(tmp_path: Path) -> None:
    class Slow(MemoryStorage):
        held = -1

        async def read_into(self, offset: int, buffer: memoryview) -> None:
            await super().read_into(offset, buffer)
            if offset == self.held:
                self.held = -1
                reading.set()
                await go_on.wait()

    reading, go_on = asyncio.Event(), asyncio.Event()
    path = create(tmp_path / "a.qcow2", "8M")
    qemu_io(path, "write -P 1 0 64k")
    run("qemu-img", "snapshot", "-c", "s", path)
    qemu_io(path, "write -P 2 0 64k")
    storage = Slow(path.read_bytes())
    driver = await Qcow2Driver.open(storage, {}, read_only=False)
    storage.held = _l2_offset(path)
    request = asyncio.create_task(driver.load(0))
    await reading.wait()
    request.cancel()  # its client is gone
    await driver.apply_snapshot("s")
    go_on.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert await read(driver, 0, 4096) == b"\1" * 4096
    await driver.close()


async def test_what_is_on_disk_is_read_when_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path / "a.qcow2", "8M", "cluster_size=4k")
    qemu_io(path, "write -P 1 0 4k", "write -P 2 4M 4k")
    driver = await open_image(path)
    await change(driver, "discard", 0, 4096)

    async def full(pieces: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(driver.storage, "write_stable", full)
        patched.setattr(driver.cache, "_generation", 0)
        assert driver.zero(4096, 4096, unmap=True) is None  # too many tables wait for a commit
        with pytest.raises(OSError, match="full"):
            await driver.load(4096)
        assert await read(driver, 4 << 20, 4096) == b"\2" * 4096
    await driver.close()


async def test_unknown_autoclear_bits_are_cleared_by_a_writable_open(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    _patch(path, 88, ">Q", 0xFF0)
    await (await open_image(path)).close()
    assert _u64(path, 88) == 0
    check(path)


async def test_bitmaps_become_inconsistent_when_we_write(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    run("qemu-img", "bitmap", "--add", path, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", path, "b1")
    driver = await open_image(path)
    await write(driver, 0, b"x")
    await driver.close()
    check(path)
    driver = await open_image(path, read_only=True)
    assert await driver.stored_bitmaps() == [
        BitmapInfo("b0", 65536, in_use=True, auto=True),
        BitmapInfo("b1", 65536, in_use=False, auto=False),
    ]
    await driver.close()


async def test_the_corrupt_bit_forbids_writing(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    _patch(path, 72, ">Q", 0b10)
    with pytest.raises(CorruptImageError, match="check -r all"):
        await open_image(path)
    driver = await open_image(path, read_only=True)
    assert driver.info().specific["corrupt"] is True
    await driver.close()


async def test_a_dirty_image_is_repaired_by_a_writable_open(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M", "lazy_refcounts=on")
    run("qemu-io", "-c", "write -P 5 0 1M", "-c", "flush", "-c", "abort", path, codes=(-6, 134))
    assert _u64(path, 72) == 1
    driver = await open_image(path)
    await write(driver, 2 << 20, b"y" * (1 << 20))
    await driver.close()
    assert _u64(path, 72) == 0
    assert check(path).get("leaks", 0) == 0
    assert content(path)[: 3 << 20] == b"\5" * (1 << 20) + bytes(1 << 20) + b"y" * (1 << 20)


def _targets(path: Path) -> dict[str, int]:
    return {
        "header": 0,
        "refcount table": _u64(path, 48),
        "refcount block": _u64(path, _u64(path, 48)),
        "L1 table": _l1_offset(path),
        "L2 table": _l2_offset(path),
        "snapshot table": _u64(path, 64),
    }


@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize(
    "target", ["header", "refcount table", "refcount block", "L1 table", "L2 table", "snapshot table"]
)
async def test_data_is_never_written_into_metadata(tmp_path: Path, target: str, extended: str) -> None:
    path = create(tmp_path / "a.qcow2", "8M", f"extended_l2={extended}")
    run("qemu-img", "snapshot", "-c", "s", path)
    qemu_io(path, "write -P 1 0 1M")
    cluster = _targets(path)[target]
    _patch(path, _l2_offset(path), ">Q", COPIED | cluster)
    before = path.read_bytes()
    driver = await open_image(path)
    with pytest.raises(RequestError) as caught:
        await write(driver, 0, b"evil" * 100)
    assert caught.value.errno == errno.EIO
    if (target, extended) == ("header", "on"):  # offset 0 in an extended entry is no host cluster at all
        await driver.close()
        assert path.read_bytes() == before
        return
    with pytest.raises(RequestError):
        await write(driver, 1 << 19, b"x")
    with pytest.raises(RequestError):
        await change(driver, "zero", 1 << 19, 1 << 16, unmap=True)
    assert await read(driver, 1 << 19, 512) == b"\1" * 512
    await driver.flush()
    await driver.close()
    after = path.read_bytes()
    assert after[72:80] == (2 | before[79]).to_bytes(8, "big")
    assert after[:79] + after[80:] == before[:79] + before[80:]


async def test_metadata_mapped_as_shared_data_is_not_freed(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    qemu_io(path, "write -P 1 0 1M")
    _patch(path, _l2_offset(path), ">Q", _l1_offset(path))
    driver = await open_image(path)
    await write(driver, 0, b"x" * 65536)
    await driver.flush()
    await driver.close()
    assert _u64(path, 72) == 2


@pytest.mark.parametrize("target", ["refcount table", "refcount block", "L1 table", "snapshot table"])
@pytest.mark.parametrize("flag", [0, COPIED])
async def test_overlapping_tables_forbid_writing(tmp_path: Path, target: str, flag: int) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    run("qemu-img", "snapshot", "-c", "s", path)
    qemu_io(path, "write -P 1 0 1M")
    _patch(path, _l1_offset(path), ">Q", flag | _targets(path)[target])
    with pytest.raises(CorruptImageError, match="overlaps"):
        await open_image(path)
    driver = await open_image(path, read_only=True)
    await driver.close()


@pytest.mark.parametrize(
    "entry", [COPIED | 0x12600, COPIED | 1 << 40, 1 << 56 | 0x50000, COPIED, COPIED | 0x50002, 0x50000 | 1 << 61]
)
async def test_an_impossible_l2_entry_fails_only_its_own_requests(tmp_path: Path, entry: int) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    qemu_io(path, "write -P 1 0 1M")
    _patch(path, _l2_offset(path), ">Q", entry)
    driver = await open_image(path, read_only=True)
    with pytest.raises(RequestError) as caught:
        await read(driver, 0, 100)
    assert caught.value.errno == errno.EIO
    assert await read(driver, 1 << 16, 1 << 16) == b"\1" * (1 << 16)
    with pytest.raises(RequestError):
        await mapping(driver)
    await driver.close()


@pytest.mark.parametrize("entry", [COPIED | 0x12600, COPIED | 1 << 40, 1 << 56 | 0x50000, COPIED, 1])
async def test_an_impossible_l1_entry_fails_only_its_own_requests(tmp_path: Path, entry: int) -> None:
    path = create(tmp_path / "a.qcow2", "1G")
    qemu_io(path, "write -P 1 0 1M", "write -P 2 512M 1M")
    _patch(path, _l1_offset(path), ">Q", entry)
    for read_only in (True, False):
        driver = await open_image(path, read_only=read_only)
        with pytest.raises(RequestError):
            await read(driver, 0, 100)
        assert await read(driver, 512 << 20, 100) == b"\2" * 100
        await driver.close()


async def test_a_compressed_bomb_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 8192)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M", tmp_path / "raw", path)
    run("qemu-img", "resize", "-q", path, "1T")
    at = _l2_offset(path)
    _patch(path, at, ">262144Q", *[_u64(path, at)] * 262144)
    driver = await open_image(path, read_only=True)
    for offset in range(0, 64 << 20, 2 << 20):
        assert await read(driver, offset, 1000) == (bytes(range(256)) * 4)[:1000]
    await driver.close()


async def test_the_data_file_must_be_given(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M", f"data_file={tmp_path / 'd'}")
    storage = await FileStorage.open(str(path), read_only=True)
    (companion,) = await Qcow2Driver.companions(storage)
    assert (companion.name, companion.field, companion.read_only) == (str(tmp_path / "d"), "data file", False)
    with pytest.raises(ImageError, match="data file"):
        await Qcow2Driver.open(storage, {}, read_only=True)
    await storage.close()


async def test_a_dirty_image_that_cannot_be_repaired_stays_as_it_is(tmp_path: Path) -> None:
    """Without the bit of the external data file, its entries point past the end of the image."""
    path = create(tmp_path / "a.qcow2", "8M", f"data_file={tmp_path / 'd'}")
    qemu_io(path, "write -P 5 6M 1M")
    _patch(path, 72, ">Q", 1)
    before = path.read_bytes()
    storage = await FileStorage.open(str(path))
    with pytest.raises(ImageError) as caught:
        await Qcow2Driver.open(storage, {}, read_only=False)
    await storage.close()
    assert caught.value.field
    assert path.read_bytes() == before
