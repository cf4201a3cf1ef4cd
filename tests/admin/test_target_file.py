from pathlib import Path

import pytest

from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.target_file import TargetFile, TargetMode
from nbdserve.block.node import Node
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage


async def disk() -> NodeEntry:
    return NodeEntry("d", "raw", Node([await RawDriver.open(MemoryStorage(bytes(1 << 20)), {}, read_only=False)]))


@pytest.mark.parametrize("format_name", [None, "raw", "qcow2", "vhdx"])
async def test_a_new_image(control: Control, tmp_path: Path, format_name: str | None) -> None:
    control.paths.add(tmp_path)
    file = TargetFile(control, str(tmp_path / "t"), format_name, "absolute-paths")
    node = await file.open(await disk())
    assert (node.size, node.format, node.read_only) == (1 << 20, format_name or "raw", False)
    await node.close()
    await file.remove()
    await file.remove()
    assert list(tmp_path.iterdir()) == []


async def test_one_that_is_there_stays(control: Control, tmp_path: Path) -> None:
    control.paths.add(tmp_path)
    (tmp_path / "t").write_bytes(b"x" * 512)
    file = TargetFile(control, str(tmp_path / "t"), "raw", "existing")
    node = await file.open(await disk())
    assert node.size == 512
    await node.close()
    await file.remove()
    assert (tmp_path / "t").read_bytes() == b"x" * 512


@pytest.mark.parametrize(
    ("name", "format_name", "mode", "problem"),
    [
        ("t", "zz", "absolute-paths", "Unknown file format 'zz'"),
        ("absent/t", None, "absolute-paths", "Could not create '.*': No such file"),
        ("absent", "raw", "existing", "Could not open '.*': No such file"),
        ("t", "dmg", "absolute-paths", "dmg"),
    ],
)
async def test_what_is_refused(
    control: Control, tmp_path: Path, name: str, format_name: str | None, mode: TargetMode, problem: str
) -> None:
    control.paths.add(tmp_path)
    with pytest.raises(QmpError, match=problem):
        await TargetFile(control, str(tmp_path / name), format_name, mode).open(await disk())
    assert list(tmp_path.iterdir()) == []


async def test_a_disk_that_has_got_other_layers_meanwhile(control: Control, tmp_path: Path) -> None:
    control.paths.add(tmp_path)
    file = TargetFile(control, str(tmp_path / "t"), "raw", "absolute-paths")
    source = await disk()
    node = await file.open(source)
    file.check(source)
    async with source.node.drained():
        source.node.replace_layers([await RawDriver.open(MemoryStorage(bytes(1 << 20)), {}, read_only=False)])
    with pytest.raises(QmpError, match="Node 'd' has got other layers while the image was made: try again"):
        file.check(source)
    await node.close()
