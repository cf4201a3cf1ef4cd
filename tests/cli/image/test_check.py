import shutil
from pathlib import Path

import pytest

from nbdserve.cli.image.check import as_text
from nbdserve.formats.base import CheckResult
from tests.cli.image.helpers import image, qemu_img
from tests.formats.qcow2.broken import CASES, make, make_good_images
from tests.support.images import needs_qemu

CODES = {
    "good": (0, 0, 0),
    "compressed": (0, 0, 0),
    "data COPIED missing": (2, 0, 0),
    "two entries for one cluster": (2, 2, 0),
    "refcount 2": (2, 0, 0),
    "bitmaps dropped by an old program": (3, 0, 0),
    "data outside the file": (2, 2, 2),
}
"""Exit codes of a plain check, of ``-r leaks`` and of ``-r all``."""


@needs_qemu
def test_exit_codes_and_output_are_those_of_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_good_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    cases = {case.name: case for case in CASES}
    for name, codes in CODES.items():
        for style in ("human", "json"):
            for options, code in zip(([], ["-r", "leaks"], ["-r", "all"]), codes, strict=True):
                make(cases[name], tmp_path, tmp_path / "image")
                shutil.copy("image", "pristine")
                ours = image(monkeypatch, "check", "--output", style, *options, "image")
                shutil.copy("pristine", "image")
                theirs = qemu_img("check", "--output", style, *options, "image", cwd=tmp_path)
                assert ours.code == theirs.code == code, (name, options, ours.err)
                assert (ours.out == theirs.out) if style == "human" else (ours.json() == theirs.json())


def test_a_format_without_check_gives_63(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").write_bytes(bytes(512))
    ours = image(monkeypatch, "check", tmp_path / "raw")
    assert ours.code == 63
    assert "does not support checks" in ours.err


def test_errors_of_the_check_itself_are_told() -> None:
    assert "3 internal errors have occurred" in as_text(CheckResult(check_errors=3))


def test_an_unknown_repair_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image(monkeypatch, "check", "-r", "some", tmp_path / "x").code == 2


def test_quiet_prints_nothing_about_a_good_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image(monkeypatch, "create", "-q", "-f", "qcow2", tmp_path / "i", "1M").code == 0
    ours = image(monkeypatch, "check", "-q", tmp_path / "i")
    assert (ours.code, ours.out, ours.err) == (0, "", "")


@needs_qemu
def test_an_image_without_its_data_file_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data", "a.qcow2", "1M", cwd=tmp_path)
    assert image(monkeypatch, "check", "a.qcow2").code == 0
    Path("data").unlink()
    for options in ([], ["-r", "all"]):
        ours = image(monkeypatch, "check", *options, "a.qcow2")
        theirs = qemu_img("check", *options, "a.qcow2", cwd=tmp_path)
        assert ours.code == theirs.code == 1
        assert "data" in ours.err
        assert "No such file or directory" in ours.err
    assert image(monkeypatch, "info", "a.qcow2").code == 0
    assert not Path("data").exists()
