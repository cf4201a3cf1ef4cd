from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError, NbdserveError
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.target import NewImage, TargetImage


def image(path: Path, form: str = "qcow2", **more: object) -> NewImage:
    return NewImage(str(path), driver_for(form), 1 << 20, **{"options": {}, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(("form", "zeroed"), [("raw", True), ("qcow2", True), ("vhdx", True), ("luks", False)])
async def test_what_is_not_written_reads_as_zeroes(tmp_path: Path, form: str, zeroed: bool) -> None:
    secret, options = (b"secret", {"iter-time": "1"}) if form == "luks" else (None, {})
    async with TargetImage(image(tmp_path / "new", form, secret=secret, options=options)) as target:
        assert target.zeroed is zeroed
        assert not (tmp_path / "new").exists()
        await target.publish()
    assert os.listdir(tmp_path) == ["new"]


async def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with TargetImage(image(tmp_path / "new")):
            raise ZeroDivisionError
    with pytest.raises(ConfigError):
        async with TargetImage(image(tmp_path / "new", options={"cluster_size": "3"})):
            pass
    with pytest.raises(ConfigError, match="needs a secret"):
        async with TargetImage(image(tmp_path / "new", "luks")):
            pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("cache", "there", "synced"), [("unsafe", False, False), ("unsafe", True, True), ("writeback", False, True)]
)
async def test_what_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, there: bool, synced: bool
) -> None:
    syncs: list[int] = []
    original = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (syncs.append(fd), original(fd)))
    if there:
        (tmp_path / "new").write_text("old")
    async with TargetImage(image(tmp_path / "new", "raw", cache=cache)) as target:
        await target.node.write(0, b"x" * 4096)
        await target.publish()
    assert bool(syncs) is synced


async def test_a_directory_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="directory"):
        async with TargetImage(image(tmp_path, "raw")):
            pass
    assert os.listdir(tmp_path) == []


async def test_a_link_that_leads_to_no_file_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    async with TargetImage(image(tmp_path / "link", "raw")) as target:
        await target.publish()
    assert sorted(os.listdir(tmp_path)) == ["link", "new"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("middle", {}, "the image and its backing file are the same file"),
        ("base", {}, "is in use"),
        ("new", {"data_file": "middle"}, "is in use"),
        ("new", {"data_file": "base"}, "is in use"),
    ],
)
async def test_its_own_base_is_not_replaced(tmp_path: Path, name: str, options: dict[str, str], problem: str) -> None:
    (tmp_path / "base").write_bytes(b"base" * 128)
    async with TargetImage(image(tmp_path / "base", "raw")) as target:
        await target.publish()
    below = {"backing_file": "base", "backing_fmt": "raw"}
    base = ImageSpec(str(tmp_path / "base"), "raw")
    async with TargetImage(image(tmp_path / "middle", options=below, base=base)) as target:
        await target.publish()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    below = {"backing_file": "middle", "backing_fmt": "qcow2"}
    base = ImageSpec(str(tmp_path / "middle"), "qcow2")
    with pytest.raises(NbdserveError, match=problem):
        async with TargetImage(image(tmp_path / name, options=below | options, base=base)):
            pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


async def test_errors_name_the_image_and_not_where_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as failure:
        async with TargetImage(image(tmp_path / "new", "raw")) as target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target.node.path)
    assert failure.value.filename == str(tmp_path / "new")
