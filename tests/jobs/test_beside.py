from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.jobs.beside import Beside, check_companion
from nbdserve.storage.file import FileStorage


async def test_a_new_file_gets_its_name_at_the_end(tmp_path: Path) -> None:
    beside = Beside(str(tmp_path / "image"))
    await beside.open()
    assert not beside.replaces
    made = Path(beside.path)
    assert (made.name, made.parent.parent) == ("image", tmp_path)
    made.write_text("new")
    made.with_name("part").write_text("its part")
    assert not (tmp_path / "image").exists()
    await beside.publish(["part"], sync=True)
    await beside.close()
    assert ((tmp_path / "image").read_text(), (tmp_path / "part").read_text()) == ("new", "its part")
    assert sorted(os.listdir(tmp_path)) == ["image", "part"]


async def test_a_name_that_may_not_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("nbdserve.jobs.beside.sync_parent", fail)
    beside = Beside(str(tmp_path / "image"))
    await beside.open()
    Path(beside.path).write_text("new")
    with pytest.raises(ImageError, match=r"image: is complete, but .* could not be synced: Input/output error"):
        await beside.publish(sync=True)
    await beside.close()
    assert os.listdir(tmp_path) == ["image"]


async def test_what_is_not_published_is_removed(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("old")
    beside = Beside(str(tmp_path / "image"))
    await beside.open()
    assert beside.replaces
    Path(beside.path).write_text("half")
    await beside.close()
    assert (os.listdir(tmp_path), (tmp_path / "image").read_text()) == (["image"], "old")


@pytest.mark.parametrize("name", ["image", "part"])
async def test_a_file_in_use_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    user = await FileStorage.open(str(tmp_path / name), read_only=True)
    with pytest.raises(ImageError, match="in use"):
        await Beside(str(tmp_path / "image")).open(["part"])
    await user.close()
    assert os.listdir(tmp_path) == [name]
    beside = Beside(str(tmp_path / "image"))
    await beside.open(["part"])  # nothing of the failed one is locked
    assert beside.replaces is (name == "image")
    await beside.close()


async def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    beside = Beside(str(tmp_path / ("\u65e5" * 85)))
    await beside.open()
    Path(beside.path).write_text("new")
    await beside.publish(sync=False)
    await beside.close()
    assert os.listdir(tmp_path) == ["\u65e5" * 85]


async def test_no_directory_to_make_it_in(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as failure:
        await Beside(str(tmp_path / "none" / "image")).open()
    assert failure.value.filename == str(tmp_path / "none" / "image")


async def test_the_mode_is_kept(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("old")
    (tmp_path / "image").chmod(0o640)
    beside = Beside(str(tmp_path / "image"))
    await beside.open()
    Path(beside.path).write_text("new")
    await beside.publish(sync=False)
    await beside.close()
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["/absolute", "../outside", "a/../../b"])
def test_files_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be made beside"):
        check_companion("image", name)
    check_companion("image", "a/b")
