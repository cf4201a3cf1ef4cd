from pathlib import Path

import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.base import Companion
from nbdserve.formats.vmdk import layout
from nbdserve.formats.vmdk.source import read_source
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB, SECTOR_SIZE
from tests.formats.vmdk.files import cowd, described, driver_of, node_of, patch, sesparse, stock
from tests.support.images import needs_qemu, raw_content, run


async def refused(path: Path) -> ImageError:
    with pytest.raises(ImageError) as caught:
        await driver_of(path, read_only=True)
    assert caught.value.field is not None
    return caught.value


async def test_companions_are_the_files_of_a_descriptor_each_once(tmp_path: Path) -> None:
    lines = ['RW 8 FLAT "b" 0', 'RW 8 FLAT "b" 8', "RW 1 ZERO", 'RDONLY 8 SPARSE "c"', 'RW 8 SESPARSE "d"']
    path = described(tmp_path / "a.vmdk", "twoGbMaxExtentFlat", *lines)
    source = await read_source(MemoryStorage(path.read_bytes()))
    assert source.companions == (
        Companion("b", "extent"),
        Companion("c", "extent", read_only=True),
        Companion("d", "extent", read_only=True),
    )


@needs_qemu
async def test_a_sparse_extent_is_an_image_and_names_no_files(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    text = path.read_bytes().replace(b'SPARSE "a.vmdk"', b'FLAT "/etc/pw" 0')
    source = await read_source(MemoryStorage(text))
    assert source.header is not None
    assert source.companions == ()
    assert source.descriptor.create_type == "monolithicSparse"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "createType"),
        ('createType="monolithicSparse"\nRW 8 SPARSE "x"', "createType"),
        ('createType="vmfs"', "extents"),
        ('createType="vmfs"\nRW 8 SPARSE "gone.vmdk"', "extent"),
        ("#" * (MIB + 1), "file size"),
    ],
)
async def test_a_file_that_is_no_image_is_refused(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "a.vmdk"
    path.write_text(text)
    with pytest.raises(ImageError) as caught:
        await node_of(path, read_only=True)
    assert caught.value.field == field


async def test_extents_must_be_of_the_form_they_are_said_to_be(tmp_path: Path) -> None:
    path = sesparse(tmp_path / "a.vmdk", [b"x" * 4096])
    described(path, "vmfsSparse", 'RW 8 VMFSSPARSE "se.vmdk"')
    assert (await refused(path)).field == "extent type"
    cowd(path, [b"x" * 512])
    described(path, "seSparse", 'RW 1 SESPARSE "esx.vmdk"')
    assert (await refused(path)).field == "extent type"
    (tmp_path / "text").write_text("x" * 600)
    described(path, "vmfsSparse", 'RW 8 VMFSSPARSE "text"')
    assert (await refused(path)).field == "magic"


@needs_qemu
async def test_esx_and_space_efficient_extents_are_read_as_qemu_does(tmp_path: Path) -> None:
    sector, grain = bytes(range(256)) * 2, bytes(range(256)) * 16
    old = cowd(tmp_path / "cowd.vmdk", [None, sector, None, b"z" * 512])
    new = sesparse(tmp_path / "sesparse.vmdk", [None, grain, 1, 2, b"y" * 4096])
    for path, wanted in (
        (old, bytes(512) + sector + bytes(512) + b"z" * 512),
        (new, bytes(4096) + grain + bytes(8192) + b"y" * 4096),
    ):
        node = await node_of(path, read_only=True)
        try:
            assert await node.read(0, node.size) == wanted
        finally:
            await node.close()
        assert raw_content(path, "vmdk", tmp_path) == wanted
        with pytest.raises(ImageError) as caught:
            await node_of(path)
        assert caught.value.hint == "open it read-only"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 1}, "version"),
        ({"grain_size": 16}, "grain size"),
        ({"table_size": 32}, "grain table size"),
        ({"flags": 1}, "flags"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": 1 << 60}, "capacity"),
        ({"volatile_offset": 0}, "volatile header offset"),
        ({"volatile_offset": 4}, "volatile magic"),
        ({"replay_journal": 1}, "replay journal"),
        ({"directory_offset": 1 << 63}, "grain directory offset"),
        ({"tables_offset": 1 << 63}, "grain tables offset"),
        ({"grains_offset": 0}, "grains offset"),
        ({"directory_entry": 5}, "grain directory entry"),
    ],
)
async def test_a_bad_space_efficient_header_is_refused(tmp_path: Path, changes: dict[str, int], field: str) -> None:
    assert (await refused(sesparse(tmp_path / "a.vmdk", [b"x" * 4096], **changes))).field == field


async def test_a_bad_esx_header_is_refused(tmp_path: Path) -> None:
    path = cowd(tmp_path / "a.vmdk", [b"x" * 512])
    good = (tmp_path / "esx.vmdk").read_bytes()
    places = {4: "version", 12: "numSectors", 16: "grainSize", 20: "gdOffset", 24: "numGDEntries"}
    for offset, field in places.items():
        (tmp_path / "esx.vmdk").write_bytes(good)
        patch(tmp_path / "esx.vmdk", offset, bytes(4))
        assert (await refused(path)).field == field


@needs_qemu
async def test_the_footer_of_a_stream_has_the_places(tmp_path: Path) -> None:
    """As VMware writes it: the header leaves the grain directory to the footer."""
    path = stock(tmp_path / "a.vmdk", MIB, "subformat=streamOptimized")
    run("qemu-io", "-f", "vmdk", "-c", "write -P 9 64k 64k", path)
    header = path.read_bytes()[:SECTOR_SIZE]
    with path.open("ab") as file:
        file.write(layout.MARKER.build({"value": 1, "size": 0, "type": layout.MARKER_FOOTER}))
        file.write(header + bytes(SECTOR_SIZE))
    patch(path, 56, b"\xff" * 8)
    assert raw_content(path, "vmdk", tmp_path)[65536:131072] == b"\x09" * 65536
    node = await node_of(path, read_only=True)
    assert await node.read(0, 192 * 1024) == bytes(65536) + b"\x09" * 65536 + bytes(65536)
    await node.close()
    path.write_bytes(path.read_bytes()[:-SECTOR_SIZE])
    assert (await refused(path)).field == "footer"


@needs_qemu
async def test_a_descriptor_too_long_for_an_extent_is_refused(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 64 * MIB)
    patch(path, 36, (4096).to_bytes(8, "little"))
    with path.open("ab") as file:
        file.truncate(8 * MIB)
    assert (await refused(path)).field == "descriptorSize"


@needs_qemu
async def test_a_descriptor_inside_a_file_without_grains_names_the_extents(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(b"x" * 4096)
    text = described(tmp_path / "text", "monolithicFlat", 'RW 8 FLAT "flat" 0').read_bytes()
    path = stock(tmp_path / "a.vmdk", MIB)
    patch(path, 12, bytes(8))
    patch(path, 512, text.ljust(10240, b"\0"))
    assert raw_content(path, "vmdk", tmp_path) == b"x" * 4096
    node = await node_of(path)
    assert await node.read(0, 4096) == b"x" * 4096
    await node.write(0, memoryview(b"new"))
    await node.close()
    assert b"CID=12345678\n" not in path.read_bytes()
    assert (tmp_path / "flat").read_bytes()[:4] == b"newx"


@needs_qemu
async def test_grain_directories_are_bounded_over_all_extents(tmp_path: Path) -> None:
    extent = stock(tmp_path / "e.vmdk", MIB)
    # 2^20 entries, 4 MiB, in a file of holes.
    patch(extent, 12, (1 << 36).to_bytes(8, "little"))
    patch(extent, 28, bytes(16))
    with extent.open("ab") as file:
        file.truncate(16 * MIB)
    lines = []
    for number in range(3):
        (tmp_path / f"e{number}.vmdk").write_bytes(extent.read_bytes())
        lines.append(f'RW 8 SPARSE "e{number}.vmdk"')
    path = described(tmp_path / "a.vmdk", "twoGbMaxExtentSparse", *lines)
    assert (await refused(path)).field == "extents"
    driver = await driver_of(described(path, "twoGbMaxExtentSparse", *lines[:2]), read_only=True)
    assert driver.size == 2 << 45
    await driver.close()


async def test_the_extents_must_be_given(tmp_path: Path) -> None:
    from nbdserve.formats.vmdk.driver import VmdkDriver  # noqa: PLC0415

    path = described(tmp_path / "a.vmdk", "monolithicFlat", 'RW 8 FLAT "flat" 0')
    storage = await FileStorage.open(str(path), read_only=True)
    with pytest.raises(ImageError, match="extents"):
        await VmdkDriver.open(storage, {}, read_only=True)
    await storage.close()


@needs_qemu
async def test_one_file_is_not_two_extents_to_be_written(tmp_path: Path) -> None:
    stock(tmp_path / "b.vmdk", MIB)
    path = described(tmp_path / "a.vmdk", "twoGbMaxExtentSparse", *['RW 2048 SPARSE "b.vmdk"'] * 2)
    await (await driver_of(path, read_only=True)).close()
    with pytest.raises(ImageError, match="another extent is in the same place") as caught:
        await driver_of(path)
    assert caught.value.field == "extent"
