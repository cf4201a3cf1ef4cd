from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.cli.image.helpers import image, qemu_img
from tests.support.images import needs_qemu, run

pytestmark = needs_qemu


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.chdir(tmp_path)
    content = random.Random(1).randbytes(1 << 20) + bytes(1 << 20) + random.Random(2).randbytes(1 << 20)
    Path("raw").write_bytes(content)
    run("qemu-img", "convert", "-O", "qcow2", "raw", "source")
    return content


@pytest.mark.parametrize(
    ("operands", "start", "end"),
    [
        ([], 0, 3 << 20),
        (["bs=64k", "count=3"], 0, 196608),
        (["bs=1M", "skip=1"], 1 << 20, 3 << 20),
        (["bs=512", "skip=2047", "count=2"], 2047 << 9, 2049 << 9),
        (["bs=1M", "skip=2", "count=7"], 2 << 20, 3 << 20),
        (["bs=1M", "skip=3"], 3 << 20, 3 << 20),
        (["bs=1M", f"count={(1 << 63) - 1}"], 0, 3 << 20),
    ],
)
def test_a_part(source: bytes, monkeypatch: pytest.MonkeyPatch, operands: list[str], start: int, end: int) -> None:
    ran = image(monkeypatch, "dd", "if=source", "of=part", *operands)
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert Path("part").read_bytes() == source[start:end]
    if len(operands) < 3:  # with both count and skip QEMU 7.2 takes the one for the size of the image
        run("qemu-img", "dd", "if=source", "of=stock", *operands)
        assert Path("stock").read_bytes() == Path("part").read_bytes()


def test_formats(source: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image(monkeypatch, "dd", "-f", "raw", "-O", "qcow2", "bs=1M", "skip=1", "if=raw", "of=part").code == 0
    run("qemu-img", "dd", "-f", "raw", "-O", "qcow2", "bs=1M", "skip=1", "if=raw", "of=stock")
    run("qemu-img", "compare", "part", "stock")


@pytest.mark.parametrize(
    ("operands", "code"),
    [
        (["if=source"], 2),
        (["if=source", "of=part", "speed=1"], 2),
        (["if=source", "of=part", "bs=0"], 1),
        (["if=source", "of=part", "bs=4G"], 1),
        (["if=source", "of=part", "skip=1000000"], 1),
        (["if=source", "of=part", f"skip={(1 << 63) - 1}"], 1),
        (["-O", "dmg", "if=source", "of=part"], 1),
    ],
)
def test_what_is_refused(source: bytes, monkeypatch: pytest.MonkeyPatch, operands: list[str], code: int) -> None:
    ran = image(monkeypatch, "dd", *operands)
    assert "part" not in os.listdir(".")
    assert ran.code == code
    stock = qemu_img("dd", *operands)
    assert stock.err.removeprefix("qemu-img: ").partition("\n")[0] in ran.err
