from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
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
