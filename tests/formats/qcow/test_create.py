"""New qcow images are those of qemu-img, byte for byte, and no bad option makes a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow.create import create_qcow
from nbdserve.formats.qcow.driver import QcowDriver
from nbdserve.units import GIB, MIB, TIB
from tests.support import images
from tests.support.recording import ByteStorage, Recorder


@images.needs_qemu
@pytest.mark.parametrize("size", [1, 512, 513, 10 * MIB, 2 * MIB - 512, 2 * MIB + 512, 130 * MIB, 1 * TIB])
@pytest.mark.parametrize("backing", [None, "base", "a base with blanks"])
async def test_qemu_img_makes_the_same(tmp_path: Path, size: int, backing: str | None) -> None:
    storage = ByteStorage()
    options = {} if backing is None else {"backing_file": backing, "backing_fmt": "raw"}
    await create_qcow(storage, size, options)
    path = tmp_path / "x.qcow"
    more = [] if backing is None else ["-b", backing, "-F", "raw"]
    images.run("qemu-img", "create", "-q", "-u", "-f", "qcow", *more, path, str(size))
    assert path.read_bytes() == storage.content


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "cannot have 0 bytes"),
        (9 * TIB, {}, "larger than the 8796093022208"),
        (MIB, {"preallocation": "metadata"}, "preallocation=metadata"),
        (MIB, {"backing_fmt": "raw"}, "needs backing_file"),
        (MIB, {"backing_file": "b"}, "never guessed"),
        (MIB, {"backing_file": "b" * 1024, "backing_fmt": "raw"}, "longer than"),
        (MIB, {"encryption": "on"}, "encryption=on"),
        (MIB, {"encrypt.format": "aes"}, "encrypt.format=aes"),
        (MIB, {"cluster_size": "4k"}, "unknown qcow option 'cluster_size'"),
    ],
)
def test_what_cannot_be_is_refused(size: int, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QcowDriver.validate_create(size, options)


async def test_a_crash_while_it_is_made_leaves_no_image() -> None:
    recorder = Recorder(1)
    await create_qcow(recorder.storage(b"QFI\xfb" + bytes(1000)), GIB, {"preallocation": "falloc"})
    header = next(i for i, entry in enumerate(recorder.log) if getattr(entry, "data", b"")[:4] == b"QFI\xfb")
    barriers = [i for i, entry in enumerate(recorder.log) if hasattr(entry, "site")]
    assert any(i < header for i in barriers)
    assert any(i > header for i in barriers)


def test_the_size_an_image_gets() -> None:
    assert QcowDriver.created_size(513, {}) == 1024
