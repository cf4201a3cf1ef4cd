import os
from pathlib import Path

import pytest

from tests.cli.image.helpers import Ran, image, make_chain, qemu_img
from tests.formats.qcow2.engine import create, mark_in_use
from tests.support.images import needs_qemu


@needs_qemu
def test_what_is_printed_is_what_qemu_img_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_chain(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        ours = image(monkeypatch, "info", "--output", "json", path)
        assert ours.json() == qemu_img("info", "--output", "json", path).json(), path.name
        assert image(monkeypatch, "info", path).out == qemu_img("info", path).out
    for style in ("json", "human"):
        arguments = ("info", "--backing-chain", "--output", style, "top")
        ours, theirs = image(monkeypatch, *arguments), qemu_img(*arguments)
        assert (ours.json() == theirs.json()) if style == "json" else (ours.out == theirs.out)


@needs_qemu
def test_bitmaps_are_shown_with_their_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "disk", "1M")
    for name in ("recording", "resting", "left"):
        assert qemu_img("bitmap", "--add", path, name).code == 0
    assert qemu_img("bitmap", "--disable", path, "resting").code == 0
    mark_in_use(path, "left")
    ours = image(monkeypatch, "info", "--output", "json", path)
    assert ours.json() == qemu_img("info", "--output", "json", path).json()
    assert image(monkeypatch, "info", path).out == qemu_img("info", path).out
    assert image(monkeypatch, "bitmap", "--add", path, os.fsdecode(b"not \xff UTF-8")).code == 0
    assert _bitmaps(image(monkeypatch, "info", "--output", "json", path))[-1]["name"] == "not \ufffd UTF-8"


def _bitmaps(ran: Ran) -> list[dict[str, str]]:
    found: list[dict[str, str]] = ran.json()["format-specific"]["data"]["bitmaps"]
    return found


@needs_qemu
def test_nothing_but_the_file_itself_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = qemu_img("create", "-u", "-f", "qcow2", "-b", "/no/such", "-F", "raw", tmp_path / "i", "1M")
    assert made.code == 0
    ours = image(monkeypatch, "info", "--output", "json", tmp_path / "i")
    assert ours.code == 0
    assert ours.json()["full-backing-filename"] == "/no/such"


@needs_qemu
def test_a_chain_is_followed_below_the_image_roots_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    overlay = tmp_path / "below" / "overlay"
    assert qemu_img("create", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", overlay).code == 0
    refused = image(monkeypatch, "info", "--backing-chain", overlay)
    assert refused.code == 1
    assert "../base.raw" in refused.err
    allowed = image(monkeypatch, "info", "--backing-chain", "--image-root", tmp_path, "--output", "json", overlay)
    assert [layer["format"] for layer in allowed.json()] == ["qcow2", "raw"]


@needs_qemu
def test_a_chain_that_loops_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loop"
    assert qemu_img("create", "-u", "-f", "qcow2", "-b", "loop", "-F", "qcow2", path, "1M").code == 0
    ours = image(monkeypatch, "info", "--backing-chain", path)
    assert ours.code == 1
    assert "loops" in ours.err


@pytest.mark.parametrize("arguments", [["info", "nosuch"], ["info", "-f", "nope", "nosuch"], ["info", "."]])
def test_errors_give_1_and_one_line(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = image(monkeypatch, *arguments)
    assert (ours.code, ours.out) == (1, "")
    assert ours.err.startswith("nbdserve: ")
    assert ours.err.count("\n") == 1


def test_no_file_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert image(monkeypatch, "info").code == 2
