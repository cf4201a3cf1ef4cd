"""The size of the disk: what qemu-img makes of the image afterwards, and what never comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, RequestError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.formats.qcow2.engine import check, content, create, open_image, qemu_io, read, run, write
from tests.support.images import needs_qemu

pytestmark = needs_qemu


async def _resize(path: Path, *sizes: int) -> None:
    driver = await open_image(path)
    try:
        for size in sizes:
            await driver.resize(size)
            assert driver.size == size
    finally:
        await driver.close()


def _virtual_size(path: Path) -> int:
    return len(content(path))


@pytest.mark.parametrize("options", ["cluster_size=512", "", "compat=0.10", "extended_l2=on", "refcount_bits=64"])
async def test_grow_far_and_shrink_back(tmp_path: Path, options: str) -> None:
    """The L1 table moves, and with small clusters the refcount table too."""
    path = create(tmp_path / "a.qcow2", 3 * MIB + 512, options)
    qemu_io(path, "write -P 1 0 1M", f"write -P 2 {3 * MIB - 512} 1k")
    before = content(path)
    size = 300 * MIB + 512
    await _resize(path, size)
    check(path)
    qemu_io(path, f"write -P 3 {size - 70_000 // 512 * 512} 64k", f"read -P 0 {3 * MIB + 512} 1M")
    check(path)
    driver = await open_image(path)
    await write(driver, 200 * MIB, b"\x07" * 100_000)
    await driver.close()
    check(path)
    await _resize(path, 3 * MIB + 512)
    check(path)
    assert content(path) == before
    assert path.stat().st_size < 4 * MIB, "the end of the file is cut off"


async def test_what_stock_left_past_the_end_does_not_appear(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 1 * MIB)
    qemu_io(path, "write -P 9 0 1M")
    run("qemu-img", "resize", "-q", "--shrink", path, 300_032)
    await _resize(path, 2 * MIB)
    check(path)
    assert content(path) == b"\x09" * 300_032 + bytes(2 * MIB - 300_032)


async def test_stock_grows_what_was_cut_here_without_the_old_content(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 1 * MIB)
    qemu_io(path, "write -P 9 0 1M")
    await _resize(path, 300_032)
    run("qemu-img", "resize", "-q", path, "1M")
    check(path)
    assert content(path) == b"\x09" * 300_032 + bytes(1 * MIB - 300_032)


async def test_what_lies_past_the_end_like_a_vm_state_is_unmapped(tmp_path: Path) -> None:
    """Mappings past the end, in the same L2 table and in others, are no part of the larger disk."""
    path = create(tmp_path / "a.qcow2", 64 * MIB, "cluster_size=4k")
    qemu_io(path, "write -P 9 0 64M")
    data = bytearray(path.read_bytes())
    data[layout.SIZE_AT : layout.SIZE_AT + 8] = (3 * MIB).to_bytes(8, "big")
    path.write_bytes(data)
    await _resize(path, 64 * MIB)
    check(path)
    assert content(path) == b"\x09" * 3 * MIB + bytes(61 * MIB)


@pytest.mark.parametrize("cut", [300_032, 64 * KIB * 3, 512, 0])
async def test_internal_snapshots_keep_their_size_and_content(tmp_path: Path, cut: int) -> None:
    path = create(tmp_path / "a.qcow2", 1 * MIB)
    qemu_io(path, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "old", path)
    await _resize(path, cut)
    check(path)
    await _resize(path, 2 * MIB)
    check(path)
    assert content(path) == (b"\x01" * cut).ljust(2 * MIB, b"\0")
    assert content(path, "-l", "old")[:MIB] == b"\x01" * MIB, "qemu-img goes on with zeroes, up to the disk's size"
    run("qemu-img", "snapshot", "-a", "old", path)
    check(path)
    assert content(path) == b"\x01" * MIB


async def test_compressed_clusters_at_the_cut(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 2048)
    for name, options in (("a.qcow2", ""), ("b.qcow2", "extended_l2=on")):
        path = tmp_path / name
        run(
            "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *(["-o", options] if options else []), source, path
        )
        for cut in (400_384, 400_384 - 400_384 % 65536 + 4096):
            await _resize(path, cut, 1 * MIB)
            check(path)
            assert content(path) == source.read_bytes()[:cut].ljust(MIB, b"\0")


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=512"])
async def test_a_longer_backing_file_does_not_show(tmp_path: Path, options: str) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"\x07" * 20 * MIB)
    path = create(tmp_path / "a.qcow2", 1 * MIB, options, "-b", base, "-F", "raw")
    below = await FileStorage.open(str(base), read_only=True)
    from nbdserve.formats.raw import RawDriver  # noqa: PLC0415  (of this test alone)

    driver = await open_image(path)
    driver.accept_backing(await RawDriver.open(below, {}, read_only=True))
    await driver.resize(30 * MIB)
    await driver.close()
    await below.close()
    check(path)
    assert content(path) == (b"\x07" * MIB).ljust(30 * MIB, b"\0")
    if "0.10" not in options:
        assert path.stat().st_size < 3 * MIB, "marked as zero, not written"


@pytest.mark.parametrize("raw", ["off", "on"])
async def test_an_external_data_file_follows(tmp_path: Path, raw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for it
    path = create(tmp_path / "a.qcow2", 2 * MIB, f"data_file=a.raw,data_file_raw={raw}")
    qemu_io(path, "write -P 5 0 2M")
    await _resize(path, 300_032)
    check(path)
    assert (tmp_path / "a.raw").stat().st_size == 300_032
    await _resize(path, 3 * MIB)
    check(path)
    expected = (b"\x05" * 300_032).ljust(3 * MIB, b"\0")
    assert content(path) == (tmp_path / "a.raw").read_bytes() == expected
    driver = await open_image(path)
    await write(driver, 2 * MIB - 100, b"\x06" * 200)
    assert await read(driver, 2 * MIB - 200, 500) == bytes(100) + b"\x06" * 200 + bytes(200)
    await driver.close()
    check(path)
    found = content(path)
    if raw == "on":
        assert (tmp_path / "a.raw").read_bytes() == found


@pytest.mark.parametrize("mode", Qcow2Driver.preallocation_modes)
@pytest.mark.parametrize("options", ["", "extended_l2=on,cluster_size=16k", "cluster_size=1k"])
async def test_preallocation(tmp_path: Path, mode: str, options: str) -> None:
    path = create(tmp_path / "a.qcow2", 100_352, options)
    qemu_io(path, "write -P 1 0 100352")
    driver = await open_image(path)
    await driver.resize(3 * MIB)
    await driver.preallocate(100_352, 3 * MIB, mode)
    kinds = {driver.lookup(offset, 512)[0] for offset in range(128 * KIB, 3 * MIB, 16 * KIB)}  # type: ignore[index]
    assert kinds == {0}, "everything is data"
    await driver.close()
    check(path)
    assert content(path) == (b"\x01" * 100_352).ljust(3 * MIB, b"\0")
    assert (path.stat().st_blocks * 512 >= 2 * MIB) == (mode != "metadata")


async def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 1 * MIB, "cluster_size=512")
    before = path.read_bytes()
    driver = await open_image(path)
    for size, words in ((MIB + 1, "multiple of 512"), (1 << 62, "L1 table")):
        with pytest.raises(ConfigError, match=words):
            await driver.resize(size)
    await driver.close()
    assert path.read_bytes() == before
    old = create(tmp_path / "old.qcow2", 1 * MIB, "compat=0.10")
    run("qemu-img", "snapshot", "-c", "x", old)
    driver = await open_image(old)
    with pytest.raises(ConfigError, match="v2 image which has snapshots"):
        await driver.resize(2 * MIB)
    await driver.close()
    driver = await open_image(path, read_only=True)
    with pytest.raises(RequestError, match="read-only"):
        await driver.resize(2 * MIB)
    await driver.close()


async def test_a_growth_that_fails_leaves_the_old_disk_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "a.qcow2", 1 * MIB, "cluster_size=512", "-b", tmp_path / "none", "-F", "raw", "-u")
    driver = await open_image(path)
    zero, calls = driver.zero, 0

    def failing(offset: int, length: int, *, unmap: bool) -> int | None:
        nonlocal calls
        calls += 1
        if calls > 300:
            raise OSError(28, "no space left")
        return zero(offset, length, unmap=unmap)

    monkeypatch.setattr(driver, "zero", failing)
    with pytest.raises(OSError, match="no space"):
        await driver.resize(64 * MIB)
    assert driver.size == MIB
    await write(driver, 500_000, b"\x04" * 5000)
    await driver.close()
    driver = await open_image(path, read_only=True)
    assert (driver.size, await read(driver, 500_000, 5000)) == (MIB, b"\x04" * 5000)
    result = await driver.check()
    assert (result.corruptions, result.leaks) == (0, 0)
    await driver.close()


async def test_a_growth_that_fails_for_good_leaves_the_l1_table_that_the_header_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path / "a.qcow2", 1 * MIB, "cluster_size=512", "-b", tmp_path / "none", "-F", "raw", "-u")
    driver = await open_image(path)
    old = driver.l1
    commit = driver.committer.commit

    async def failing() -> None:
        if driver.l1 is not old:
            raise OSError(5, "the disk is gone")
        await commit()

    monkeypatch.setattr(driver.committer, "commit", failing)
    with pytest.raises(OSError, match="gone"):
        await driver.resize(64 * MIB)
    assert driver.l1 is driver.committer.l1 is old
    monkeypatch.undo()
    await write(driver, 500_000, b"\x04" * 5000)
    await driver.close()
    driver = await open_image(path, read_only=True)
    assert await read(driver, 500_000, 5000) == b"\x04" * 5000
    assert (await driver.check()).corruptions == 0
    await driver.close()
