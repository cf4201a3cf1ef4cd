"""``image amend`` beside ``qemu-img amend``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.image.helpers import image, qemu_img
from tests.support.images import needs_qemu

pytestmark = needs_qemu


def test_the_same_changes_and_the_same_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for path in (ours, theirs):
        qemu_img("create", "-q", "-f", "qcow2", path, "10M")
    for options in (
        "compat=0.10",
        "compat=1.1,refcount_bits=32",
        "compat=0.10",
        "compat=0.10,refcount_bits=16",
        "lazy_refcounts=on",
        "foo=1",
        "data_file=x",
        "size=1M",
        "lazy_refcounts=on,size=8M",
        "compat=0.10,size=4M",
        "compat=0.10,lazy_refcounts=on",
    ):
        a = image(monkeypatch, "amend", "-f", "qcow2", "-o", options, ours)
        b = qemu_img("amend", "-f", "qcow2", "-o", options, theirs)
        assert a.code == b.code, (options, a.err, b.err)
        if b.err:
            assert b.err.removeprefix("qemu-img: ").splitlines()[0].split(" with comp")[0] in a.err, options
        facts = [qemu_img("info", "--output=json", path).json() for path in (ours, theirs)]
        assert facts[0]["virtual-size"] == facts[1]["virtual-size"], options
        assert facts[0]["format-specific"] == facts[1]["format-specific"], options
    assert qemu_img("check", ours).code == 0


def test_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image(monkeypatch, "amend", tmp_path / "a").code == 2
    assert image(monkeypatch, "amend", "-o", "size=1M").code == 2
    listed = image(monkeypatch, "amend", "-f", "qcow2", "-o", "help")
    assert (listed.code, listed.out.splitlines()[0]) == (0, "Amend options for 'qcow2':")
    (tmp_path / "raw").write_bytes(bytes(512))
    for arguments in (["-o", "help"], ["-o", "size=1M", tmp_path / "raw"]):
        ran = image(monkeypatch, "amend", "-f", "raw", *arguments)
        assert (ran.code, "does not support option amendment" in ran.err) == (1, True)


def test_what_is_refused_for_its_size_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("qcow2", "vdi"):
        assert qemu_img("create", "-f", form, tmp_path / form, "1M").code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ran = image(monkeypatch, "amend", "-o", "lazy_refcounts=on,size=big", tmp_path / "qcow2")
    assert (ran.code, "invalid size 'big'" in ran.err) == (1, True)
    ran = image(monkeypatch, "amend", "-o", "compat=0.10,size=2M", tmp_path / "vdi")
    assert (ran.code, "'vdi' does not support option amendment" in ran.err) == (1, True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
