import os
import stat
from pathlib import Path

import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.paths import PathPolicy, PrivatePaths
from nbdserve.storage.roots import ImageRoots


async def opened(policy: PathPolicy, path: str, *, read_only: bool = True) -> str:
    file = await policy.open(path, read_only=read_only)
    await file.close()
    return file.path


async def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    (root / "a").write_bytes(bytes(512))
    (root / "link").symlink_to(root / "a")
    os.mkfifo(root / "fifo")
    gone = tmp_path / "gone"
    gone.mkdir()
    policy = PathPolicy([root, root, gone])
    gone.rmdir()
    assert policy.roots == [root, gone]
    for name in ("a", "link", "below/../a"):
        assert await opened(policy, f"{root}/{name}", read_only=False)
    monkeypatch.chdir(root)
    assert await opened(policy, "a") == str(root / "a")
    (tmp_path / "x").touch()
    (root / "out").symlink_to(tmp_path / "x")
    (root / "up").symlink_to("../x")
    for path, problem in (
        (str(root / "new"), "No such file"), (str(root), "Is a directory"), (str(root / "below"), "Is a directory"),
        ("", "empty"), ("a\0", "NUL"), (str(root / "fifo"), "neither a regular file nor a block device"),
        (str(tmp_path / "x"), "outside the image roots"), (f"{root}/../x", "outside"), (f"{root}x/a", "outside"),
        (f"{root}/out", "outside"), (f"{root}/up", "outside"),
    ):  # fmt: skip
        with pytest.raises(QmpError, match=problem):
            await policy.open(path, read_only=True)


async def test_making_files(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root / "below", outside):
        directory.mkdir(parents=True)
    (root / "escape").symlink_to(outside)
    (root / "dangling").symlink_to(outside / "made")
    policy = PathPolicy([root])
    for name in ("new", "below/new"):
        file, is_new = await policy.create(str(root / name))
        assert is_new
        assert not file.read_only
        await file.close()
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o644 & ~_umask()
    (root / "new").write_bytes(b"old")
    file, is_new = await policy.create(str(root / "new"))
    assert (is_new, file.size) == (False, 0)
    await file.close()
    await policy.remove(str(root / "new"))
    assert not (root / "new").exists()
    for name in ("escape/made", "dangling"):
        with pytest.raises(QmpError, match=r"outside the image roots|No such file"):
            await policy.create(str(root / name))
    assert list(outside.iterdir()) == []


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


async def test_a_link_put_in_the_way_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is exchanged for a link between the look at the name and the opening of the file."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    for directory in (root / "d", secret):
        directory.mkdir(parents=True)
        (directory / "image").write_bytes(bytes(512))
    places = ImageRoots._places

    def exchanged(self: ImageRoots, name: str) -> list[tuple[Path, str]]:
        found = places(self, name)
        if not (root / "d").is_symlink():
            (root / "d").rename(root / "moved")
            (root / "d").symlink_to(secret)
        return found

    monkeypatch.setattr(ImageRoots, "_places", exchanged)
    policy = PathPolicy([root])
    with pytest.raises(QmpError, match="outside the image roots"):
        await policy.open(str(root / "d" / "image"), read_only=True)
    with pytest.raises(QmpError, match="outside the image roots"):
        await policy.create(str(root / "d" / "new"))
    assert not (secret / "new").exists()


def test_no_image_header_reaches_the_roots_for_secrets(tmp_path: Path) -> None:
    images, keys = tmp_path / "images", tmp_path / "keys"
    for directory in (images, keys):
        directory.mkdir()
        (directory / "key").write_bytes(b"k")
    policy = PathPolicy([images])
    private = PrivatePaths(policy)
    private.add(keys)
    for directory in (images, keys):
        os.close(private.open_secret(str(directory / "key"), os.O_RDONLY))
        os.close(private.directory_of(str(directory / "s")))
    with pytest.raises(OSError, match="cross-device"):
        policy.image_roots().open(str(keys / "key"), os.O_RDONLY)
