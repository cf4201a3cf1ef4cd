"""``image commit`` beside ``qemu-img commit``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdserve.cli.image.commit import _find
from nbdserve.errors import ConfigError
from tests.cli.image.helpers import Ran, image, interrupted, marked, qemu_img
from tests.support import images
from tests.support.images import needs_qemu

pytestmark = needs_qemu

SIZE = 2 << 20


def _chain(folder: Path, *formats: str, size: int = SIZE) -> list[Path]:
    """Images over each other, every one with data, zeroes and a part that is its own."""
    folder.mkdir()
    made: list[Path] = []
    for number, fmt in enumerate(formats):
        path = folder / f"{number}.{fmt}"
        backing = (made[-1].name, made[-1].suffix[1:]) if made else None
        images.create(path, size, fmt=fmt, backing=backing)
        at = number * 192
        commands = [f"write -P {number + 1} {at}k 100k", f"write -P {number + 9} 1M 50k"]
        if number:
            commands.append(f"write -z {at - 64}k 96k")
        images.qemu_io(path, fmt, commands)
        made.append(path)
    return made


@pytest.mark.parametrize(
    ("formats", "arguments"),
    [
        (("raw", "qcow2"), []),
        (("qcow2", "qcow2"), ["-p", "-t", "none"]),
        (("qed", "qcow2", "qcow2"), ["-d"]),
        (("raw", "qcow2", "qcow2"), ["-b", "0.raw", "-q"]),
        (("vdi", "qcow2"), ["-r", "100M"]),
        (("parallels", "qed"), []),
        (("vhdx", "qcow2"), []),
        (("qcow2", "qcow"), ["-d"]),
    ],
)
def test_every_layer_has_what_qemu_img_leaves_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: tuple[str, ...], arguments: list[str]
) -> None:
    ours = _chain(tmp_path / "ours", *formats)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    theirs = [tmp_path / "theirs" / path.name for path in ours]
    name = str(ours[-1])
    if formats[-1] == "qcow":
        name = f'json:{{"driver":"qcow","file.filename":"{ours[-1]}","backing.driver":"{formats[-2]}"}}'
    monkeypatch.chdir(tmp_path / "ours")
    a = image(monkeypatch, "commit", *arguments, name)
    monkeypatch.chdir(tmp_path / "theirs")
    b = qemu_img("commit", *arguments, theirs[-1])
    assert (a.code, a.out.splitlines()[-1:]) == (b.code, b.out.splitlines()[-1:]), a.err
    for own, other in zip(ours, theirs, strict=True):
        fmt = own.suffix[1:]
        assert qemu_img("compare", "-f", fmt, "-F", fmt, own, other).code == 0, own
        if fmt not in ("raw", "qcow"):
            images.check(own, fmt)
    if formats[-1] == "qcow2" and not {"-d", "-b"} & set(arguments):
        held = qemu_img("map", "--output=json", ours[-1]).json()
        assert all(extent["depth"] > 0 or not extent["present"] for extent in held), "the image is empty"


def test_a_smaller_base_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fmt in ("raw", "qcow2"):
        base, top = tmp_path / f"base.{fmt}", tmp_path / f"top-{fmt}.qcow2"
        images.create(base, SIZE, fmt=fmt)
        images.create(top, 2 * SIZE, backing=(base.name, fmt))
        images.qemu_io(top, "qcow2", ["write -P 7 3M 64k"])
        assert image(monkeypatch, "commit", "-q", top).code == 0
        assert images.info(base, fmt)["virtual-size"] == 2 * SIZE
        images.qemu_io(base, fmt, ["read -P 7 3M 64k", "read -P 0 0 3M"])


@pytest.mark.parametrize("internal", [False, True])
def test_what_is_compressed_or_kept_in_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, internal: bool
) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    images.create(base, SIZE)
    images.create(top, SIZE, backing=(base.name, "qcow2"))
    images.qemu_io(base, "qcow2", ["write -P 1 0 1M"])
    images.qemu_io(top, "qcow2", ["write -c -P 2 64k 64k", "write -P 3 512k 64k"])
    if internal:
        assert qemu_img("snapshot", "-c", "kept", top).code == 0
        assert qemu_img("snapshot", "-c", "kept", base).code == 0
    result = image(monkeypatch, "commit", top)
    assert result.code == 0, result.err
    images.qemu_io(base, "qcow2", ["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 512k 64k"])
    images.check(base)
    images.check(top)
    if internal:
        assert qemu_img("snapshot", "-a", "kept", top).code == 0
        images.qemu_io(top, "qcow2", ["read -P 2 64k 64k"])
        images.check(top)


@pytest.mark.parametrize("options", [[], ["-d"]])
def test_stored_bitmaps_of_the_image_stay_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    _, top = _chain(tmp_path / "chain", "raw", "qcow2")
    assert qemu_img("bitmap", "--add", top, "kept").code == 0
    assert image(monkeypatch, "commit", *options, top).code == 0
    assert [bitmap["flags"] for bitmap in images.info(top)["format-specific"]["data"]["bitmaps"]] == [["auto"]]


def test_refusals_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, top = _chain(tmp_path / "chain", "raw", "qcow2")
    before = [path.read_bytes() for path in (base, top)]
    for arguments, message in (
        (["-b", "nope", top], "Did not find 'nope' in the backing chain"),
        (["-f", "raw", base], "Image does not have a backing file"),
        (["-t", "fast", top], "Invalid cache option"),
        (["-r", "quick", top], "Invalid rate limit"),
    ):
        result = image(monkeypatch, "commit", *arguments)
        assert result.code == 1
        assert message in result.err
    assert [path.read_bytes() for path in (base, top)] == before


def test_interrupted(tmp_path: Path) -> None:
    base = tmp_path / "base"
    images.create(base, 12 << 20, fmt="raw")
    top = marked(tmp_path / "top", "qcow2", "-b", str(base), "-F", "raw")
    before = tmp_path / "before"
    images.run("qemu-img", "convert", "-O", "raw", top, before)
    assert interrupted("commit", top) == Ran(130, "", "")
    runs = [base.read_bytes()[start : start + (256 << 10)] for start in (0, 8 << 20)]
    assert any(run == b"\xd7" * (256 << 10) for run in runs), "it was in the middle: one of the two was written"
    assert sorted(os.listdir(tmp_path)) == ["base", "before", "top"]
    images.run("qemu-img", "compare", before, top)
    images.run("qemu-img", "check", "-q", top)


def test_a_layer_that_is_no_file_is_not_the_one_meant(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    layers = [SimpleNamespace(path="top", backing=None), SimpleNamespace(path="nbd://host/disk", backing=None)]
    node: Any = SimpleNamespace(path="top", layers=layers)
    with pytest.raises(ConfigError, match="Did not find"):
        _find(node, str(tmp_path / "file"))
