import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.image.create import create
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.vmdk.create import SUBFORMATS, created_names, parse_options
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, KIB, MIB, TIB
from tests.formats.vmdk.files import node_of, stock
from tests.support.images import check, info, needs_qemu, run


def normalised(path: Path) -> Any:
    """What qemu-img says of an image, without what differs by chance."""
    found = info(path, "vmdk")
    for key in ("actual-size", "filename", "full-backing-filename"):
        found.pop(key, None)
    found["format-specific"]["data"]["cid"] = 0
    text: str = json.dumps(found)
    return json.loads(text.replace(str(path.parent), ""))


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, with the content ID blanked."""
    result = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        at = data.find(b"\nCID=")
        if 0 <= at < 16 * KIB:
            end = data.index(b"\n", at + 1)
            shift = 8 - (end - at - 5)  # QEMU leaves leading zeroes out
            data = data[: at + 5] + b"........" + data[end:]
            if data.startswith(b"KDMV"):
                data = data[: 10752 + shift].rstrip(b"\0").ljust(10752, b"\0") + data[10752 + shift :]
        result[path.name] = data
    return result


@needs_qemu
@pytest.mark.parametrize("size", [512, MIB, 2 * GIB, 2 * GIB + 512, 5 * GIB])
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_files_are_those_of_qemu(tmp_path: Path, subformat: str, size: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = [f"subformat={subformat}", "adapter_type=lsilogic", "toolsversion=7"]
    if not subformat.endswith("Flat"):
        options.append("zeroed_grain=on")
    for folder in (ours, theirs):
        folder.mkdir()
    stock(theirs / "a.b.vmdk", size, ",".join(options))
    assert create(str(ours / "a.b.vmdk"), str(size), "vmdk", options=[",".join(options)], quiet=True) == 0
    assert [path.name for path in sorted(ours.iterdir())] == [path.name for path in sorted(theirs.iterdir())]
    for path in ours.iterdir():
        assert path.stat().st_size == pytest.approx((theirs / path.name).stat().st_size, abs=8)
    if size <= 64 * MIB or not subformat.endswith("Flat"):
        assert file_bytes(ours) == file_bytes(theirs)
    assert normalised(ours / "a.b.vmdk") == normalised(theirs / "a.b.vmdk")
    check(ours / "a.b.vmdk", "vmdk")


@needs_qemu
@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized"])
async def test_a_child_knows_its_parent(tmp_path: Path, subformat: str) -> None:
    base = stock(tmp_path / "base.vmdk", 3 * MIB)
    run("qemu-io", "-f", "vmdk", "-c", "write -P 5 64k 64k", base)
    child = tmp_path / "child.vmdk"
    command = partial(create, str(child), None, "vmdk", "base.vmdk", "vmdk", [f"subformat={subformat}"], quiet=True)
    assert await asyncio.to_thread(command) == 0
    run("qemu-io", "-f", "vmdk", "-c", "read -P 5 64k 64k", "-c", "read -P 0 0 64k", child, cwd=tmp_path)
    node = await node_of(child, read_only=True)
    assert await node.read(0, 192 * KIB) == bytes(65536) + b"\5" * 65536 + bytes(65536)
    await node.close()


@pytest.mark.parametrize(
    ("size", "options", "names"),
    [
        (MIB, {"subformat": "nothing"}, "subformat"),
        (MIB, {"adapter_type": "scsi"}, "adapter_type"),
        (MIB, {"compat6": "on", "hwversion": "7"}, "compat6"),
        (MIB, {"compat6": "maybe"}, "compat6"),
        (MIB, {"zeroed_grain": "2"}, "zeroed_grain"),
        (MIB, {"subformat": "monolithicFlat", "zeroed_grain": "on"}, "zeroed_grain"),
        (MIB, {"subformat": "twoGbMaxExtentFlat", "backing_file": "x"}, "backing_file"),
        (MIB, {"backing_file": "x", "backing_fmt": "raw"}, "backing_fmt"),
        (MIB, {"backing_file": "x" * 1024, "backing_fmt": "vmdk"}, "descriptor"),
        (MIB, {"hwversion": '4"\nCID=1'}, "descriptor"),
        (MIB, {"preallocation": "metadata"}, "preallocation"),
        (MIB, {"preallocation": "full"}, "preallocation"),
        (0, {}, "sector"),
        (65 * TIB, {}, "sparse"),
        (9 * TIB, {"subformat": "twoGbMaxExtentFlat"}, "extents"),
        (MIB, {"cluster_size": "64k"}, "cluster_size"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_is_touched(
    size: int, options: dict[str, str], names: str
) -> None:
    with pytest.raises(ConfigError, match=names):
        VmdkDriver.validate_create(size, options)
    storage = MemoryStorage(b"precious")
    if "cluster_size" not in options:
        with pytest.raises(ConfigError, match=names):
            await VmdkDriver.create(storage, size, options)
    assert await storage.read(0, 8) == b"precious"


async def test_parents_are_vmdk_images_and_open() -> None:
    with pytest.raises(ConfigError, match="content ID"):
        await VmdkDriver.create(MemoryStorage(), MIB, {"backing_file": "x", "backing_fmt": "vmdk"})
    from nbdserve.formats.raw import RawDriver  # noqa: PLC0415

    raw = await RawDriver.open(MemoryStorage(bytes(MIB)), {}, read_only=True)
    with pytest.raises(ImageError, match="backing_file"):
        await VmdkDriver.create(MemoryStorage(), MIB, {"backing_file": "x"}, backing=raw)


def test_names_of_extents() -> None:
    assert created_names("d.x/a", parse_options(MIB, {"subformat": "monolithicFlat"})) == ["a-flat"]
    split = parse_options(4 * GIB + 1, {"subformat": "twoGbMaxExtentSparse"})
    assert created_names("x/a.b.img", split) == ["a.b-s001.img", "a.b-s002.img", "a.b-s003.img"]
    assert split.extent_sizes == [2 * GIB, 2 * GIB, 512]
    assert created_names("a", parse_options(MIB, {})) == []


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_flat_files_are_preallocated(tmp_path: Path, mode: str) -> None:
    options = [f"subformat=monolithicFlat,preallocation={mode}"]
    assert create(str(tmp_path / "a.vmdk"), "3M", "vmdk", options=options, quiet=True) == 0
    assert (tmp_path / "a-flat.vmdk").stat().st_blocks * 512 >= 3 * MIB


async def test_the_files_must_be_those_of_the_subformat() -> None:
    with pytest.raises(ConfigError, match="go together"):
        await VmdkDriver.create(MemoryStorage(), MIB, {"subformat": "monolithicFlat"})
    with pytest.raises(ConfigError, match="go together"):
        await VmdkDriver.create(MemoryStorage(), MIB, {}, companions=[MemoryStorage()])
    assert VmdkDriver.created_size(1000, {}) == 1024
