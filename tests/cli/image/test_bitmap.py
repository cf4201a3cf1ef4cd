"""``nbdserve image bitmap`` beside ``qemu-img bitmap``: the same bitmaps afterwards, and the same messages."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from nbdserve.formats.base import BitmapInfo
from tests.cli.image.helpers import image, qemu_img
from tests.formats.qcow2.engine import check, create, mark_in_use, open_image, qemu_io
from tests.support.images import needs_qemu

pytestmark = needs_qemu


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``disk`` with several bitmaps, of which ``off`` is disabled and ``old`` inconsistent, and images beside it."""
    folder = tmp_path_factory.mktemp("bitmap")
    disk, other, longer = folder / "disk", folder / "other", folder / "longer"
    create(disk, "3M")
    for name, granularity in (("fine", "512"), ("old", "64k"), ("off", "128k")):
        qemu_img("bitmap", "--add", "-g", granularity, disk, name)
    qemu_io(disk, "write 0 10k", "write 2M 300k")
    qemu_img("bitmap", "--disable", disk, "off")
    qemu_io(disk, "write 1M 64k")
    create(other, "3M", "cluster_size=4k")
    create(longer, "4M")
    for path in (other, longer):
        qemu_img("bitmap", "--add", path, "fine")
    qemu_io(other, "write 1536k 1M")
    create(folder / "v2", "1M", "compat=0.10")
    mark_in_use(disk, "old")
    (folder / "raw").write_bytes(bytes(1 << 20))
    return folder


async def stored(path: Path) -> list[tuple[BitmapInfo, bytes]]:
    """The bitmaps in the image, and what is in them."""
    driver, found = await open_image(path, read_only=True), []
    for info in await driver.stored_bitmaps() or ():
        bitmap = await driver.stored_bitmap(info.name)
        assert bitmap is not None
        found.append((info, bytes(bitmap.bits.octets)))
    await driver.close()
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        "--add disk new",
        "--add --disable -g 4k --merge fine --merge off disk new",
        "--remove disk fine",
        "--remove disk old",
        "--clear disk fine",
        "--enable disk off",
        "--merge fine -b other -F qcow2 disk off",
        "--merge off disk fine",
        "--add --merge fine --clear --merge off --disable --enable disk new",
        "--add --merge absent --disable disk new",
        "--add --remove disk new",
        "--remove --add -g 4k disk fine",
        "--clear --remove --enable disk fine",
        "--clear disk old",
        "--merge old disk fine",
        "--merge fine disk old",
        "--merge fine -b longer disk fine",
        "--merge absent -b other disk fine",
        "--merge fine disk absent",
        "--add disk fine",
        "--add -g 600 disk new",
        "--add -g 4G disk new",
        "--add --image-opts driver=qcow2,file.filename=disk new",
        "--remove -f raw raw new",
    ],
)
def test_it_does_what_qemu_img_does(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    ran = []
    for tool in ("ours", "stock"):
        folder = Path(shutil.copytree(images, tmp_path / tool))
        monkeypatch.chdir(folder)
        words = arguments.split()
        done = image(monkeypatch, "bitmap", *words) if tool == "ours" else qemu_img("bitmap", *words)
        said = done.err.replace("nbdserve: ", "").replace("qemu-img: ", "")
        check(folder / "disk")
        ran.append((done.code, done.out, said, asyncio.run(stored(folder / "disk"))))
    assert ran[0] == ran[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("disk fine", 2, "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"),
        ("--clear disk", 2, "Expecting filename and bitmap name"),
        ("--clear disk a b", 2, "Expecting filename and bitmap name"),
        ("--clear -g 1k disk fine", 2, "granularity only supported with --add"),
        ("--clear -b other disk fine", 2, "Merge bitmap source file only supported with --merge"),
        ("--merge fine -F qcow2 disk fine", 2, "-F only supported with -b"),
        ("--add --image-opts -f qcow2 disk fine", 1, "--image-opts and --format are mutually exclusive"),
        ("--add -g 1Q disk new", 1, "Invalid granularity specified"),
        ("--add v2 new", 1, "'v2': Cannot store dirty bitmaps in qcow2 v2 files"),
        ("--add -f raw raw new", 1, "Can't store persistent bitmaps to raw: Operation not supported"),
        (f"--add disk {'x' * 1024}", 1, "Name length exceeds maximum (1023 characters)"),
        ("--add absent new", 1, "absent"),
    ],
)
def test_what_is_refused_changes_nothing(
    images: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, message: str
) -> None:
    monkeypatch.chdir(images)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    ran = image(monkeypatch, "bitmap", *arguments.split())
    assert (ran.code, message in ran.err, "Traceback" in ran.err) == (code, True, False), ran
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
