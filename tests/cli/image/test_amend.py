"""``image amend`` beside ``qemu-img amend``."""

from __future__ import annotations

import shutil
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
        "encrypt.state=inactive",
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


CHANGES = [
    "state=active",
    "state=inactive",
    "new-secret=b",
    "state=inactive,new-secret=b",
    "state=inactive,old-secret=c",
    "state=inactive,keyslot=5",
    "state=inactive,keyslot=8",
    "state=inactive,iter-time=4,keyslot=0",
    "state=active,old-secret=a,new-secret=b,iter-time=0",
    "state=bogus",
    "state=active,new-secret=nosuch",
    "key-secret=b",
    "bogus=1",
    "state=active,new-secret=c,keyslot=0,iter-time=0",
    "state=active,new-secret=c,keyslot=9,iter-time=0",
    "state=active,new-secret=c,keyslot=7,iter-time=0",
    "state=active,new-secret=b,iter-time=0",
    "state=inactive,old-secret=b,keyslot=7",
    "state=inactive,keyslot=7",
    "state=inactive,old-secret=a",
    "state=inactive,keyslot=1",
    "state=inactive,old-secret=b",
]


@pytest.mark.parametrize("fmt", ["luks", "qcow2"])
def test_passphrases_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    """Stock tools look for a second how fast they are whenever they set one, so that they do it for one format."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    objects = []
    for name in "abc":
        (tmp_path / name).write_text(f"passphrase {name}")
        objects += ["--object", f"secret,id={name},file={tmp_path / name}"]
    prefix = "encrypt." if fmt == "qcow2" else ""
    options = f"{prefix}key-secret=a,{prefix}iter-time=0" + (",encrypt.format=luks" if prefix else "")
    assert image(monkeypatch, "create", "-q", *objects, "-f", fmt, "-o", options, ours, "1M").code == 0
    shutil.copy(ours, theirs)
    opens = "a"
    for change in CHANGES if fmt == "luks" else CHANGES[-7:]:
        named = ",".join(f"{prefix}{item}" for item in change.split(","))
        ran = image(monkeypatch, "amend", "-f", fmt, "--secret-file", tmp_path / opens, *objects, "-o", named, ours)
        if fmt == "luks":
            stock = f"driver={fmt},file.filename={theirs},{prefix}key-secret={opens}"
            other = qemu_img("amend", *objects, "--image-opts", stock, "-o", named)
            assert ran.code == other.code, (change, ran.err, other.err)
            if other.err:
                assert other.err.removeprefix("qemu-img: ").splitlines()[0].strip() in ran.err, change
            assert _active(ours, fmt) == _active(theirs, fmt), change
        if "old-secret=a" in change and not ran.code:
            opens = "b"
    assert (opens, _active(ours, fmt)) == ("b", [1])
    for secret, code in (("a", 1), ("b", 0), ("c", 1)):
        spec = f"driver={fmt},file.filename={ours},{prefix}key-secret={secret}"
        assert qemu_img("map", "--output=json", *objects, "--image-opts", spec).code == code


def _active(path: Path, fmt: str) -> list[int]:
    """The key slots in use."""
    specific = qemu_img("info", "-f", fmt, "--output=json", path).json()["format-specific"]["data"]
    return [number for number, slot in enumerate(specific.get("encrypt", specific)["slots"]) if slot["active"]]
