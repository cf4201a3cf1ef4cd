import asyncio
import json
from pathlib import Path

import pytest

from nbdserve.cli.image.check import Repair
from nbdserve.cli.image.check import check as check_command
from nbdserve.cli.image.info import info as info_command
from nbdserve.cli.output import Output
from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.vmdk.descriptor import Descriptor
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.formats.vmdk.layout import UNCLEAN_AT
from nbdserve.storage.file import FileStorage
from nbdserve.units import GIB, KIB, MIB, TIB
from tests.formats.vmdk.files import GRAIN, content, described, driver_of, node_of, patch, put, qemu_io, stock, tables
from tests.support import images
from tests.support.images import needs_qemu

pytestmark = needs_qemu


def cid(path: Path) -> int:
    return Descriptor.parse(path.read_bytes()[512:10752], "x").cid


@pytest.mark.parametrize(
    "options",
    [
        "subformat=monolithicSparse",
        "subformat=monolithicSparse,zeroed_grain=on",
        "subformat=monolithicFlat",
        "subformat=twoGbMaxExtentSparse",
        "subformat=twoGbMaxExtentFlat",
    ],
)
async def test_writes_cross_extents_and_qemu_agrees(tmp_path: Path, options: str) -> None:
    size = 4 * GIB + 3 * MIB + 512
    path = stock(tmp_path / "a.vmdk", size, options)
    node = await node_of(path)
    writes = {
        2 * GIB - 700: b"first border " * 100,
        4 * GIB - 70000: b"second border" * 10000,
        size - 512: b"e" * 512,
        5: b"at the beginning",
    }
    for offset, data in writes.items():
        await node.write(offset, memoryview(data))
    await node.zero(2 * GIB - 300, 400)
    for offset, data in writes.items():
        if offset != 2 * GIB - 700:
            assert await node.read(offset, len(data)) == data
    border = bytearray(writes[2 * GIB - 700])
    border[400:800] = bytes(400)
    await node.close()
    images.check(path, "vmdk")
    node = await node_of(path, read_only=True)
    assert await node.read(2 * GIB - 700, len(border)) == border
    await node.close()
    images.qemu_io(path, "vmdk", [f"read -P 101 {size - 512} 512"])
    copy = tmp_path / "raw"
    images.convert(path, "vmdk", copy, "raw")
    with copy.open("rb") as file:
        for offset, data in (writes | {2 * GIB - 700: bytes(border)}).items():
            file.seek(offset)
            assert file.read(len(data)) == data
    copy.unlink()


async def test_the_content_id_changes_once_and_before_anything_else(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    first = cid(path)
    node = await node_of(path)
    await node.read(0, 512)
    await node.close()
    assert cid(path) == first
    driver = await driver_of(path)
    assert driver.lookup_writable(0, 512) is None
    assert cid(path) == first
    await driver.load(0)
    assert driver.lookup_writable(0, 512) is not None
    second = driver.descriptor.cid
    assert second != first
    await put(driver, 0, bytes(GRAIN))
    await driver.flush()
    await put(driver, GRAIN, bytes(GRAIN))
    await driver.close()
    assert cid(path) == second
    driver = await driver_of(path)
    await put(driver, 0, bytes(GRAIN))
    await driver.close()
    assert cid(path) not in (first, second)


async def test_a_short_content_id_keeps_its_place(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB, "subformat=monolithicFlat")
    path.write_text(path.read_text().replace("CID=", "CID=7\n#", 1))
    before = path.read_text()
    node = await node_of(path)
    await node.write(0, memoryview(b"x"))
    await node.close()
    after = path.read_text()
    assert len(after) == len(before)
    changed = [new for new, old in zip(after, before, strict=True) if new != old]
    assert len(changed) == 1
    assert changed[0] in "012345689abcdef"


async def test_a_changed_parent_is_refused(tmp_path: Path) -> None:
    base = stock(tmp_path / "base.vmdk", 4 * MIB)
    qemu_io(base, "write -P 3 0 1M")
    child = stock(tmp_path / "child.vmdk", None, backing="base.vmdk")
    node = await node_of(child)
    await node.write(100, memoryview(b"mine"))
    assert await node.read(98, 8) == b"\3\3mine\3\3"
    await node.close()
    assert content(child)[98:106] == b"\3\3mine\3\3"
    node = await node_of(base)
    await node.write(0, memoryview(b"other"))
    await node.close()
    with pytest.raises(ImageError, match="parentCID") as caught:
        await node_of(child)
    assert "base.vmdk" in str(caught.value)
    node = await node_of(child, backing=None)
    assert await node.read(100, 4) == b"mine"
    await node.close()


async def test_a_parent_is_a_vmdk_image(tmp_path: Path) -> None:
    from nbdserve.block.spec import ImageSpec  # noqa: PLC0415

    (tmp_path / "raw").write_bytes(bytes(MIB))
    path = stock(tmp_path / "a.vmdk", MIB)
    with pytest.raises(ImageError, match="parentFileNameHint"):
        await node_of(path, backing=ImageSpec(str(tmp_path / "raw"), "raw", read_only=True))


async def test_the_mark_is_there_while_tables_change(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    qemu_io(path, "write 0 64k")
    driver = await driver_of(path)
    await put(driver, 0, b"x" * GRAIN)
    await driver.flush()
    assert path.read_bytes()[UNCLEAN_AT] == 0
    await put(driver, GRAIN, b"x" * GRAIN)
    assert path.read_bytes()[UNCLEAN_AT] == 1
    await driver.close()
    assert path.read_bytes()[UNCLEAN_AT] == 0
    # That of a crash stays until a check has looked.
    patch(path, UNCLEAN_AT, b"\1")
    driver = await driver_of(path)
    await put(driver, 2 * GRAIN, b"x" * GRAIN)
    await driver.close()
    assert path.read_bytes()[UNCLEAN_AT] == 1


async def test_an_open_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    qemu_io(path, "write 0 64k")
    with path.open("ab") as file:
        file.truncate(200_000)
    before = path.read_bytes()
    for read_only in (True, False):
        driver = await driver_of(path, read_only=read_only)
        while driver.lookup(0, 512) is None:
            await driver.load(0)
        await driver.flush()
        await driver.close()
        assert path.read_bytes() == before


async def test_both_copies_of_the_tables_are_written(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 100 * MIB, "zeroed_grain=on")
    driver = await driver_of(path, discard="unmap")
    for offset in (0, 31 * MIB, 32 * MIB, 99 * MIB):
        await put(driver, offset, b"x" * 3 * GRAIN)
    await driver.flush()
    assert driver.discard(32 * MIB, GRAIN) == GRAIN
    await driver.close()
    primary, redundant = tables(path)
    assert primary == redundant
    assert sum(entry > 1 for entry in primary) == 11
    assert primary.count(1) == 1
    images.check(path, "vmdk")


async def test_a_failed_commit_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    driver = await driver_of(path)
    await put(driver, 0, b"x" * GRAIN)
    real = FileStorage.write_stable

    async def broken(*_: object) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(FileStorage, "write_stable", broken)
    with pytest.raises(OSError, match="full"):
        await driver.flush()
    monkeypatch.setattr(FileStorage, "write_stable", real)
    assert tables(path)[0][0] == 0
    await driver.flush()
    assert tables(path)[0][0] == tables(path)[1][0] != 0
    await driver.close()


async def test_a_disk_of_terabytes_takes_little_memory(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 2 * TIB)
    node = await node_of(path)
    for number in range(40):
        await node.write(number * 50 * GIB + 5, memoryview(b"there"))
    assert await node.read(39 * 50 * GIB, 12) == bytes(5) + b"there\0\0"
    driver = node.top
    assert isinstance(driver, VmdkDriver)
    assert driver.sparse[0].directory.nbytes == 256 * KIB
    assert len(driver.sparse[0].cache.recent) == 40
    await node.close()
    images.qemu_io(path, "vmdk", [f"read -P 116 {39 * 50 * GIB + 5} 1"])


async def test_extents_that_must_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(bytes(MIB))
    stock(tmp_path / "sparse", MIB)
    for lines in (
        ['RDONLY 8 FLAT "flat" 0'],
        ['RW 8 FLAT "flat" 0', "RW 8 ZERO"],
        ['RW 8 FLAT "flat" 0', 'RW 2048 SPARSE "sparse"'],
    ):
        path = described(tmp_path / "a.vmdk", "twoGbMaxExtentFlat", *lines)
        with pytest.raises(ImageError, match="extent"):
            await node_of(path)
        node = await node_of(path, read_only=True)
        assert await node.read(0, node.size) == bytes(node.size)
        await node.close()


async def test_flat_and_sparse_extents_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(b"f" * MIB)
    stock(tmp_path / "sparse", MIB)
    lines = ['RW 1024 FLAT "flat" 128', 'RW 2048 SPARSE "sparse"', 'RW 128 FLAT "flat" 1200']
    path = described(tmp_path / "a.vmdk", "twoGbMaxExtentFlat", *lines)
    node = await node_of(path)
    await node.write(500 * KIB, memoryview(b"w" * 100 * KIB))
    await node.zero(1500 * KIB, 60 * KIB)
    await node.discard(0, GRAIN)
    await node.close()
    wanted = b"f" * 500 * KIB + b"w" * 100 * KIB + bytes(900 * KIB) + bytes(60 * KIB) + b"f" * 40 * KIB
    assert content(path) == wanted


async def test_a_flat_image_is_its_files(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 4 * MIB, "subformat=monolithicFlat")
    driver = await driver_of(path)
    assert not type(driver).can("zero")
    assert not type(driver).can("discard")
    assert driver.zeroes_fast
    assert driver.keeps_places
    await driver.close()
    node = await node_of(path, discard="unmap")
    await node.write(0, memoryview(b"x" * MIB))
    await node.discard(0, MIB)
    await node.close()
    assert (tmp_path / "a-flat.vmdk").read_bytes() == bytes(4 * MIB)


async def test_paths_of_extents_stay_under_the_roots(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret" * 100)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    for name in (str(tmp_path / "secret"), "../secret", "link", "json:{}", "nbd:x", "/etc/passwd", "/dev/zero", "."):
        path = described(folder / "a.vmdk", "monolithicFlat", f'RW 1 FLAT "{name}" 0')
        with pytest.raises(ImageError) as caught:
            await node_of(path, read_only=True)
        assert caught.value.field == "extent"
        assert caught.value.value == name
    path = described(folder / "a.vmdk", "monolithicFlat", 'RW 1 FLAT "a.vmdk" 0')
    with pytest.raises(ImageError, match="the image itself"):
        await node_of(path, read_only=True)


@pytest.mark.parametrize(
    "options",
    ["subformat=" + name for name in ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "streamOptimized")]
    + ["subformat=twoGbMaxExtentFlat", "zeroed_grain=on"],
)
def test_info_is_that_of_qemu(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str) -> None:
    path = stock(tmp_path / "a.vmdk", 3 * GIB, options)
    if "Flat" not in options:
        stock(path, None, options, backing=str(stock(tmp_path / "base.vmdk", 3 * GIB)))
    assert info_command(str(path), "vmdk", output=Output.JSON) == 0
    assert json.loads(capsys.readouterr().out) == images.info(path, "vmdk")


async def test_check_repairs_by_command(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    qemu_io(path, "write 0 128k")
    redundant = int.from_bytes(path.read_bytes()[0x15 * 512 :][:4], "little") * 512
    patch(path, redundant, bytes(4))
    codes = [
        await asyncio.to_thread(check_command, str(path), "vmdk"),
        await asyncio.to_thread(check_command, str(path), "vmdk", Repair.ALL),
        await asyncio.to_thread(check_command, str(path), "vmdk"),
    ]
    assert codes == [2, 0, 0]


async def test_reads_of_a_missing_table_share_the_work(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 64 * MIB)
    driver = await driver_of(path, read_only=True)
    extent = driver.sparse[0]
    loads: list[int] = []
    real = extent.load_table

    async def counted(index: int) -> None:
        loads.append(index)
        await real(index)

    extent.load_table = counted  # type: ignore[method-assign]
    assert driver.lookup(0, 512) is None
    await asyncio.gather(driver.load(0), driver.load(512), driver.load(33 * MIB))
    assert sorted(loads) == [0, 1]
    await driver.load(0)
    assert len(loads) == 2
    await driver.close()


async def test_zero_extents_take_no_writes(tmp_path: Path) -> None:
    path = described(tmp_path / "a.vmdk", "vmfs", "RW 8 ZERO")
    driver = await driver_of(path, read_only=True)
    with pytest.raises(RequestError):
        driver.extents[0].lookup_writable(0, 1)
    await driver.close()
