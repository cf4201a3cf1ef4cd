"""``image resize`` beside ``qemu-img resize``."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.image.resize import _preallocate
from nbdserve.formats.registry import DRIVERS
from tests.cli.image.helpers import image, qemu_img
from tests.formats.qcow2.engine import bits_of, mark_in_use
from tests.support.images import needs_qemu

pytestmark = needs_qemu

MIB = 1 << 20


def _size(path: Path) -> int:
    return int(qemu_img("info", "--output=json", "-f", path.suffix[1:], path).json()["virtual-size"])


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_sizes_and_refusals_are_those_of_qemu_img(tmp_path: Path, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tmp_path / f"a.{fmt}", tmp_path / f"b.{fmt}"
    for path in (ours, theirs):
        qemu_img("create", "-q", "-f", fmt, path, "10M")
    for arguments in (
        ["5M"],
        ["--shrink", "5M"],
        ["5M"],
        ["+1M"],
        ["--shrink", "-2M"],
        ["-100M"],
        ["0"],
        ["1M", "--shrink", "--preallocation=falloc"],
        ["--preallocation=foo", "20M"],
        ["--preallocation=metadata", "+1M"],
        ["--preallocation=falloc", "+1M"],
        ["--preallocation=full", "+1M"],
        ["-q", "+512"],
        ["10X"],
    ):
        options = [word for word in arguments if word.startswith("--") or word == "-q"]
        size = next(word for word in arguments if word not in options)
        a = image(monkeypatch, "resize", "-f", fmt, *options, ours, size)
        b = qemu_img("resize", "-f", fmt, *options, theirs, size)
        assert (a.code, a.out) == (b.code, b.out), (arguments, a, b)
        assert _size(ours) == _size(theirs), arguments
        if b.err and "size' expects" not in b.err and "Unsupported" not in b.err:
            first = b.err.removeprefix("qemu-img: ").splitlines()[0].rstrip(".")
            assert first in a.err, arguments
    assert qemu_img("compare", "-f", fmt, "-F", fmt, ours, theirs).code == 0
    if fmt == "qcow2":
        assert qemu_img("check", ours).code == 0


def test_stored_bitmaps_have_the_size_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "3M")
    qemu_img("bitmap", "--add", path, "kept")
    qemu_img("bitmap", "--add", "--disable", path, "left")
    assert image(monkeypatch, "resize", path, "40M").code == 0
    assert image(monkeypatch, "resize", path, "20M").code == 1  # without --shrink: nothing has changed
    assert qemu_img("check", path).code == 0
    assert [each["offset"] for each in bits_of(path, "kept") if each["type"]] == [3 * MIB]
    mark_in_use(path, "left")
    ran = image(monkeypatch, "resize", path, "50M")
    assert "Bitmap 'left' is inconsistent and cannot be used" in ran.err
    assert ran.code == 1
    assert _size(path) == 40 * MIB
    assert qemu_img("check", path).code == 0


def test_a_longer_backing_file_does_not_show_in_the_last_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").write_bytes(b"\x07" * 3 * MIB)
    for options in ("compat=1.1", "compat=0.10", "extended_l2=on"):
        path = tmp_path / "a.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", options, path, "1000448", cwd=tmp_path)
        assert image(monkeypatch, "resize", path, "4M").code == 0
        assert qemu_img("check", path).code == 0
        qemu_img("convert", "-O", "raw", path, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == (b"\x07" * 1000448).ljust(4 * MIB, b"\0"), options


@pytest.mark.parametrize("fmt", [name for name, driver in DRIVERS.items() if driver.can("create") and name != "luks"])
def test_every_format_is_resized_or_says_that_it_cannot_be(
    tmp_path: Path, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{fmt}"
    options = ["-o", f"raw_file={tmp_path}/raw"] if fmt == "raw-cow" else []
    assert image(monkeypatch, "create", "-q", "-f", fmt, *options, path, "8M").code == 0
    before = path.read_bytes()
    ran = image(monkeypatch, "resize", "-f", fmt, path, "16M")
    if DRIVERS[fmt].can("resize"):
        assert (ran.code, ran.out) == (0, "Image resized.\n"), ran.err
    else:
        assert ran.code == 1
        assert "does not support resize" in ran.err
        assert path.read_bytes() == before


def test_no_space_for_preallocation_leaves_the_old_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    before = tmp_path / "before"
    shutil.copy(path, before)

    async def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nbdserve.formats.qcow2.resize.reserve", failing)
    ran = image(monkeypatch, "resize", "--preallocation=full", path, "8M")
    assert (ran.code, ran.out) == (1, "")
    assert "No space left" in ran.err
    assert _size(path) == MIB
    assert qemu_img("check", path).code == 0
    assert image(monkeypatch, "resize", path).code == 2, "a size is missing"


async def test_a_preallocation_that_is_interrupted_leaves_the_old_size() -> None:
    sizes: list[int] = []

    class Interrupted:
        size = 2 << 20
        top: Any

        async def preallocate(self, start: int, end: int, mode: str) -> None:
            raise asyncio.CancelledError

        async def resize(self, size: int) -> None:
            sizes.append(size)

    node: Any = Interrupted()
    node.top = node
    with pytest.raises(asyncio.CancelledError):
        await _preallocate(node, 1 << 20, "full")
    assert sizes == [1 << 20]
