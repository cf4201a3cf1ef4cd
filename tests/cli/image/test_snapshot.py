"""``image snapshot`` beside ``qemu-img snapshot``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.image.helpers import image, qemu_img
from tests.support.images import needs_qemu

pytestmark = needs_qemu


def _without_dates(text: str) -> list[list[str]]:
    return [
        [word for word in line.split() if word.count(":") != 2 and word.count("-") != 2] for line in text.splitlines()
    ]


def test_the_same_commands_leave_the_same_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for path in (ours, theirs):
        qemu_img("create", "-q", "-f", "qcow2", path, "10M")
    for arguments in (
        [],
        ["-l"],
        ["-c", "one"],
        ["-c", "one"],
        ["-c", ""],
        ["-a", "1"],
        ["-a", "nix"],
        ["-d", "nix"],
        ["-d", "2"],
        ["-d", "one"],
        ["-a", "one"],
        ["-l"],
        ["-U", "-l"],
    ):
        a, b = image(monkeypatch, "snapshot", *arguments, ours), qemu_img("snapshot", *arguments, theirs)
        assert a.code == b.code, (arguments, a.err, b.err)
        assert _without_dates(a.out) == _without_dates(b.out), arguments
        assert b.err.removeprefix("qemu-img: ").split(":")[0].strip() in a.err, arguments
    assert qemu_img("check", ours).code == 0


def test_options_that_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["-l", "-c", "x"], ["-a", "x", "-d", "x"], ["-U", "-c", "x"], []):
        assert image(monkeypatch, "snapshot", *arguments, *([tmp_path / "a"] if arguments else [])).code == 2


def test_formats_without_snapshots_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(4096))
    for verb in ("-c", "-a", "-d"):
        ran = image(monkeypatch, "snapshot", verb, "x", raw)
        assert ran.code == 1
        assert "raw images have no internal snapshots" in ran.err
    assert image(monkeypatch, "snapshot", "-l", raw).out == ""
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "d.qcow2", "1M")
    ran = image(monkeypatch, "snapshot", "-c", "x", "d.qcow2")
    assert (ran.code, "external data file" in ran.err) == (1, True)
