from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.create import create_files
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.file import FileStorage


async def test_an_image_of_two_files(tmp_path: Path) -> None:
    paths = [str(tmp_path / "image"), str(tmp_path / "data")]
    await create_files(Qcow2Driver, paths, 1 << 20, {"data_file": "data"})
    assert (tmp_path / "image").read_bytes()[:4] == b"QFI\xfb"
    assert (tmp_path / "data").stat().st_size == 1 << 20


async def test_what_fails_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "data"
    old.write_bytes(b"old")

    async def full(self: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(FileStorage, "flush", full)
    with pytest.raises(OSError, match="No space"):
        await create_files(Qcow2Driver, [str(tmp_path / "image"), str(old)], 1 << 20, {"data_file": "data"})
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("cache", ["writeback", "unsafe"])
async def test_only_unsafe_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    synced: list[str] = []

    async def note(path: str) -> None:
        synced.append(path)

    monkeypatch.setattr("nbdserve.block.create.sync_parent", note)
    path = str(tmp_path / "image")
    await create_files(RawDriver, [path], 512, {"nocow": "on"}, cache=cache)
    assert synced == ([] if cache == "unsafe" else [path])
