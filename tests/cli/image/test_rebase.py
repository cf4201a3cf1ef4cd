"""``image rebase`` beside ``qemu-img rebase``."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.cli.image.helpers import Ran, image, interrupted, marked, qemu_img
from tests.support import images
from tests.support.images import needs_qemu

pytestmark = needs_qemu

SIZE = 2 << 20


def _bases(folder: Path, old: str, new: str, top: str, new_size: int) -> tuple[Path, Path, Path]:
    folder.mkdir()
    rng = random.Random(f"{old} {new}")
    paths = folder / f"old.{old}", folder / f"new.{new}", folder / f"top.{top}"
    same = [f"write -P 5 {64 * n}k 64k" for n in range(4)]
    for path, size in zip(paths, (SIZE, new_size, SIZE), strict=True):
        fmt = path.suffix[1:]
        images.create(path, size, fmt=fmt, backing=(paths[0].name, old) if path is paths[2] else None)
        own = [
            f"write -P {rng.randrange(1, 255)} {rng.randrange(0, size - (1 << 18), 512)} {rng.randrange(1, 512) * 512}"
            for _ in range(4)
        ]
        images.qemu_io(path, fmt, (own if path is paths[2] else same) + own)
    return paths


@pytest.mark.parametrize(
    ("old", "new", "top", "size"),
    [
        ("raw", "raw", "qcow2", SIZE),
        ("qcow2", "raw", "qcow2", SIZE // 2),
        ("raw", "qcow2", "qcow2", 2 * SIZE),
        ("qcow2", "qed", "qed", SIZE // 2 + 512),
        ("vdi", "vmdk", "qcow2", SIZE),
    ],
)
def test_the_disk_stays_and_the_header_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, top: str, size: int
) -> None:
    _, base, ours = _bases(tmp_path / "ours", old, new, top, size)
    before = images.raw_content(ours, top, tmp_path) if top != "qed" else None
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    theirs = tmp_path / "theirs" / ours.name
    name = str(ours)
    if top == "qed":
        name = f'json:{{"driver":"qed","file.filename":"{ours}","backing.driver":"{old}"}}'
    assert qemu_img("rebase", "-b", base.name, "-F", new, theirs).code == 0
    result = image(monkeypatch, "rebase", "-p", "-b", base.name, "-F", new, name)
    assert (result.code, result.out.rpartition("\r")[2]) == (0, "\n"), result.err
    (ours.parent / f"old.{old}").unlink()
    if before is not None:
        assert images.raw_content(ours, top, tmp_path) == before
    assert qemu_img("compare", "-f", top, "-F", top, ours, theirs).code == 0
    images.check(ours, top)
    found, wanted = (images.info(path, top) for path in (ours, theirs))
    for key in ("backing-filename", "backing-filename-format", "format-specific"):
        assert found.get(key) == wanted.get(key)
    assert ours.stat().st_blocks <= 2 * theirs.stat().st_blocks, "what both have alike is not copied"


@pytest.mark.parametrize("top", ["qcow2", "qed"])
def test_no_backing_file_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: str) -> None:
    old, _, path = _bases(tmp_path / "images", "raw", "raw", top, SIZE)
    before = images.raw_content(path, top, tmp_path)
    assert image(monkeypatch, "rebase", "-b", "", path).code == 0
    old.unlink()
    assert images.raw_content(path, top, tmp_path) == before
    assert "backing-filename" not in images.info(path, top)
    images.check(path, top)


@pytest.mark.parametrize("fmt", ["vmdk", "vpc", "vhdx"])
def test_formats_that_know_the_identity_of_their_backing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str
) -> None:
    for name, backing in (("old", ""), ("same", ""), ("new", ""), ("top", "old")):
        more = ["-b", f"{backing}.{fmt}", "-F", fmt] if backing else ["-o", "force_size=on"] if fmt == "vpc" else []
        size = SIZE if name != "new" else SIZE // 2
        assert image(monkeypatch, "create", "-q", "-f", fmt, *more, tmp_path / f"{name}.{fmt}", size).code == 0
    path, raw = tmp_path / f"top.{fmt}", tmp_path / "before"
    for name in ("old", "same"):
        qemu_io = ["-c", "write -P 5 64k 64k", "-c", f"write -P 6 {SIZE - 65536} 512"]
        images.run("qemu-io", "-f", fmt, *qemu_io, tmp_path / f"{name}.{fmt}")
    refused = fmt != "vpc"  # whose identity stays when it is written to
    assert image(monkeypatch, "convert", "-f", fmt, "-O", "raw", path, raw).code == refused
    assert image(monkeypatch, "rebase", "-u", "-b", f"same.{fmt}", "-F", fmt, path).code == 0
    (tmp_path / f"old.{fmt}").unlink()
    assert image(monkeypatch, "convert", "-f", fmt, "-O", "raw", path, raw).code == 0
    assert raw.read_bytes()[65536:66048] == b"\5" * 512
    for base in (f"new.{fmt}", ""):
        more = ["-F", fmt] if base else []
        assert image(monkeypatch, "rebase", "-b", base, *more, path).code == 0
        assert image(monkeypatch, "compare", "-f", fmt, "-F", "raw", path, raw).code == 0
        assert image(monkeypatch, "check", "-q", path).code == 0
    (tmp_path / f"new.{fmt}").unlink()
    assert images.raw_content(path, fmt, tmp_path) == raw.read_bytes()
    for more, problem in ((["-u", "-F", fmt], "nosuch"), (["-F", "raw"], f"below a {fmt} image is {fmt}, not raw")):
        refused = image(monkeypatch, "rebase", "-b", "nosuch", *more, path)
        assert (refused.code, problem in refused.err) == (1, True), refused.err


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_stored_bitmaps_stay_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    _, base, top = _bases(tmp_path / "images", "raw", "raw", "qcow2", SIZE)
    assert qemu_img("bitmap", "--add", top, "kept").code == 0
    assert image(monkeypatch, "rebase", *options, "-b", base.name, "-F", "raw", top).code == 0
    assert [bitmap["flags"] for bitmap in images.info(top)["format-specific"]["data"]["bitmaps"]] == [["auto"]]


def test_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "top.qcow2"
    images.create(tmp_path / "base.raw", SIZE, fmt="raw")
    images.create(path, SIZE, backing=("base.raw", "raw"))
    assert image(monkeypatch, "rebase", "-u", "-b", "gone.qed", "-F", "qed", path).code == 0
    found = images.info(path)
    assert (found["backing-filename"], found["backing-filename-format"]) == ("gone.qed", "qed")
    failed = image(monkeypatch, "rebase", "-b", "base.raw", "-F", "raw", path)
    assert failed.code == 1
    assert "gone.qed" in failed.err
    assert image(monkeypatch, "rebase", "-u", "-b", "", path).code == 0
    assert "backing-filename" not in images.info(path)


def test_refusals_are_qemu_imgs_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "top.qcow2"
    images.create(base, SIZE, fmt="raw")
    images.create(path, SIZE, backing=("base.raw", "raw"))
    before = path.read_bytes()
    for arguments in (
        [path],
        ["-b", "base.raw", path],
        ["-u", "-b", "base.raw", path],
        ["-b", "base.raw", "-F", "nosuch", path],
        ["-b", "missing.raw", "-F", "raw", path],
        ["-f", "raw", "-u", "-b", "base.raw", "-F", "raw", base],
        ["-b", "top.qcow2", "-F", "qcow2", path],
    ):
        ours, theirs = image(monkeypatch, "rebase", *arguments), qemu_img("rebase", *arguments)
        assert ours.code == theirs.code == 1, (arguments, ours)
        first = theirs.err.removeprefix("qemu-img: ").splitlines()[0]
        if "Could not open" not in first and "lock" not in first:
            assert first.rpartition(": ")[2].rstrip(".") in ours.err, arguments
        assert "Traceback" not in ours.err
    assert path.read_bytes() == before


def test_interrupted(tmp_path: Path) -> None:
    old, new, top, before = (tmp_path / name for name in ("old", "new", "top", "before"))
    marked(old)
    images.create(new, 12 << 20, fmt="raw")
    images.create(top, 12 << 20, fmt="qcow2", backing=("old", "raw"))
    images.run("qemu-img", "convert", "-O", "raw", top, before)
    assert interrupted("rebase", "-b", "new", "-F", "raw", top) == Ran(130, "", "")
    assert qemu_img("info", "--output", "json", top).json()["backing-filename"] == "old"
    assert sorted(os.listdir(tmp_path)) == ["before", "new", "old", "top"]
    images.run("qemu-img", "compare", before, top)
    images.run("qemu-img", "check", "-q", top)
