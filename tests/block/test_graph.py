"""Opening chains: what is followed, what is refused, and that a refusal leaves nothing changed and nothing open."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.graph import MAX_CHAIN_DEPTH, open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError, ImageError, RequestError
from nbdserve.extents import ZERO
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.registry import DRIVERS
from nbdserve.storage.file import FileStorage
from nbdserve.storage.roots import ImageRoots
from nbdserve.units import KIB, MIB
from tests.support.images import create, needs_qemu, qemu_io, run

SIZE = 256 * KIB
BACKING_FORMAT_EXTENSION = b"\xe2\x79\x2a\xca"


async def _make(path: Path, backing: str = "", fmt: str = "", **options: str) -> Path:
    """A qcow2 with a backing file named in its header, which need not exist."""
    storage = await FileStorage.open(str(path), create=True)
    if backing:
        options |= {"backing_file": backing, "backing_fmt": fmt or "raw"}
    await Qcow2Driver.create(storage, SIZE, options)
    if backing and not fmt:
        header = await storage.read(0, 512)
        await storage.write(0, header.replace(BACKING_FORMAT_EXTENSION, b"\x12\x34\x56\x78"))
    await storage.close()
    return path


def _raw(path: Path, fill: bytes, size: int = SIZE) -> Path:
    path.write_bytes(fill * size)
    return path


def _spec(path: Path, fmt: str | None = "qcow2", **fields: Any) -> ImageSpec:
    return dataclasses.replace(ImageSpec(str(path), fmt), **fields)


Snapshot = dict[Path, tuple[bytes, int]]


def _state(folder: Path) -> Snapshot:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _open_files(folder: Path) -> set[str]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.add(target)
    return found


async def _refused(
    folder: Path, spec: ImageSpec, roots: ImageRoots | None = None, kind: type[Exception] = ImageError
) -> str:
    """The message of the refusal, after which all is as before."""
    before = _state(folder)
    with pytest.raises(kind) as caught:
        await open_image(spec, roots)
    assert _state(folder) == before
    assert _open_files(folder) == set()
    return str(caught.value)


async def test_a_chain_is_followed_down_its_headers(tmp_path: Path) -> None:
    _raw(tmp_path / "base.raw", b"b")
    (tmp_path / "sub").mkdir()
    await _make(tmp_path / "sub" / "mid.qcow2", "../base.raw", "raw")
    top = await _make(tmp_path / "top.qcow2", "sub/mid.qcow2", "qcow2")
    node = await open_image(_spec(top), ImageRoots([tmp_path]))
    assert [layer.name for layer in node.layers] == ["qcow2", "qcow2", "raw"]
    assert [layer.read_only for layer in node.layers] == [False, True, True]
    await node.write(0, b"t" * 512)
    assert await node.read(0, 1024) == b"t" * 512 + b"b" * 512
    await node.close()
    assert (tmp_path / "base.raw").read_bytes() == b"b" * SIZE
    assert _open_files(tmp_path) == set()


async def test_every_layer_has_the_time_to_unlock_that_was_given(tmp_path: Path) -> None:
    storage = await FileStorage.open(str(tmp_path / "base.luks"), create=True)
    await DRIVERS["luks"].create(storage, SIZE, {"iter-time": "0"}, secret=b"s")
    await storage.close()
    top = await _make(tmp_path / "top.qcow2", "base.luks", "luks")
    for path, fmt in ((tmp_path / "base.luks", "luks"), (top, "qcow2")):
        spec = _spec(path, fmt, secret=b"s")
        await (await open_image(spec)).close()
        assert "0.0001 are allowed" in await _refused(tmp_path, dataclasses.replace(spec, unlock_seconds=0.0001))


async def test_a_backing_format_is_never_guessed(tmp_path: Path) -> None:
    _raw(tmp_path / "base.raw", b"b")
    top = await _make(tmp_path / "top.qcow2", "base.raw")
    message = await _refused(tmp_path, _spec(top))
    assert message.startswith(str(top))
    assert "base.raw" in message
    assert "rebase -u" in message


async def test_a_backing_format_that_does_not_exist_is_the_fault_of_the_image(tmp_path: Path) -> None:
    _raw(tmp_path / "base.raw", b"b")
    top = await _make(tmp_path / "top.qcow2", "base.raw", "rawr")
    message = await _refused(tmp_path, _spec(top))
    assert message.startswith(f"{top}: backing format = 'rawr': ")


async def test_the_user_may_name_the_backing_file_or_detach_it(tmp_path: Path) -> None:
    _raw(tmp_path / "base.raw", b"b")
    top = await _make(tmp_path / "top.qcow2", "gone.raw")
    for backing, content in ((_spec(tmp_path / "base.raw", "raw"), b"b"), (None, b"\0")):
        node = await open_image(_spec(top, backing=backing))
        assert await node.read(0, 1) == content
        await node.close()


@pytest.mark.parametrize(
    "name",
    [
        "json:{}",
        'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/hostname"}}',
        "nbd://localhost/x",
        "nbd:unix:/tmp/sock",
        "https://example.com/disk",
        "file:/etc/hostname",
        "/etc/hostname",
        "../outside.raw",
        "link-out.raw",
        "/dev/zero",
        "/proc/self/mem",
        "fifo",
        "subdirectory",
        "absent.raw",
        ".",
    ],
)
async def test_evil_backing_names_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    (folder / "subdirectory").mkdir(parents=True)
    _raw(tmp_path / "outside.raw", b"s", 512)
    (folder / "link-out.raw").symlink_to(tmp_path / "outside.raw")
    os.mkfifo(folder / "fifo")
    top = await _make(folder / "top.qcow2", name, "raw")
    message = await _refused(folder, _spec(top))
    assert message.startswith(str(top))
    assert "backing file" in message
    assert repr(name) in message


async def test_another_root_may_be_allowed(tmp_path: Path) -> None:
    _raw(tmp_path / "base.raw", b"b")
    (tmp_path / "images").mkdir()
    top = await _make(tmp_path / "images" / "top.qcow2", str(tmp_path / "base.raw"), "raw")
    assert "image roots" in await _refused(tmp_path, _spec(top))
    node = await open_image(_spec(top), ImageRoots([tmp_path / "images", tmp_path]))
    assert await node.read(0, 1) == b"b"
    await node.close()


@pytest.mark.parametrize("length", [1, 2, 5])
async def test_a_loop_is_found_by_the_identity_of_its_files(tmp_path: Path, length: int) -> None:
    for number in range(length):
        await _make(tmp_path / f"{number}.qcow2", f"{(number + 1) % length}.qcow2", "qcow2")
    message = await _refused(tmp_path, _spec(tmp_path / "0.qcow2", read_only=True))
    assert "loop" in message


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symlink", "hardlink"])
async def test_a_loop_through_a_link_is_found(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    top = await _make(tmp_path / "top.qcow2", "alias.qcow2", "qcow2")
    link(tmp_path / "alias.qcow2", top)
    assert "loop" in await _refused(tmp_path, _spec(top, read_only=True))


async def test_a_chain_may_be_64_layers_deep_and_no_deeper(tmp_path: Path) -> None:
    for number in range(MAX_CHAIN_DEPTH + 1):
        last = number == MAX_CHAIN_DEPTH
        await _make(
            tmp_path / f"{number}.qcow2",
            "" if last else f"{number + 1}.qcow2",
            "" if last else "qcow2",
            cluster_size="512",
        )
    message = await _refused(tmp_path, _spec(tmp_path / "0.qcow2"))
    assert "more than 64 layers" in message
    assert message.startswith(str(tmp_path / "0.qcow2"))
    node = await open_image(_spec(tmp_path / "1.qcow2"))
    assert len(node.layers) == 64
    assert await node.read(0, 512) == bytes(512)
    await node.close()


@pytest.mark.parametrize("backing", ["gone.raw", "../outside.raw"])
async def test_a_backing_file_of_which_nothing_shows_need_not_be_there(tmp_path: Path, backing: str) -> None:
    (tmp_path / "sub").mkdir()
    _raw(tmp_path / "outside.raw", b"o")
    raw = await FileStorage.open(str(_raw(tmp_path / "sub" / "vm.img", b"r")), read_only=False)
    top = tmp_path / "sub" / "top"
    storage = await FileStorage.open(str(top), create=True)
    options = {"backing_file": backing, "backing_fmt": "raw", "raw_file": "vm.img"}
    await RawCowDriver.create(storage, SIZE, options, companions=[raw])
    await raw.close()
    await storage.close()
    assert "backing file" in await _refused(tmp_path, _spec(top, "raw-cow"))
    top.write_bytes(top.read_bytes()[:4096] + b"\x0f".ljust(512, b"\0"))
    node = await open_image(_spec(top, "raw-cow"))
    assert await node.read(0, SIZE) == b"r" * SIZE
    await node.top.resize(2 * SIZE)
    assert node.top.lookup(SIZE, SIZE) == (ZERO, SIZE, -1)
    await node.close()
    assert _open_files(tmp_path) == set()


async def test_a_damaged_backing_file_leaves_the_top_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "base.qcow2").write_bytes(b"QFI\xfb\x00\x00\x00\x03" + b"\xff" * 600)
    top = await _make(tmp_path / "top.qcow2", "base.qcow2", "qcow2")
    assert str(tmp_path / "base.qcow2") in await _refused(tmp_path, _spec(top))


async def test_what_is_mended_at_open_is_not_touched_when_a_layer_below_cannot_be_opened(tmp_path: Path) -> None:
    vm, base, top = _raw(tmp_path / "vm.img", b"r"), _raw(tmp_path / "base", b"b"), tmp_path / "top"
    raw, storage = await FileStorage.open(str(vm), read_only=False), await FileStorage.open(str(top), create=True)
    options = {"backing_file": "base", "backing_fmt": "raw", "raw_file": "vm.img"}
    await RawCowDriver.create(storage, SIZE, options, companions=[raw])
    await raw.close()
    await storage.close()
    os.truncate(vm, SIZE // 2)
    base.rename(tmp_path / "elsewhere")
    assert "backing file" in await _refused(tmp_path, _spec(top, "raw-cow"))
    (tmp_path / "elsewhere").rename(base)
    node = await open_image(_spec(top, "raw-cow"))
    assert vm.stat().st_size == SIZE
    assert await node.read(0, SIZE) == b"b" * SIZE
    await node.close()


@needs_qemu
async def test_nor_is_what_is_encrypted(tmp_path: Path) -> None:
    """A header with an unknown autoclear bit, which a writer clears."""
    base, top = _raw(tmp_path / "base", b"b"), tmp_path / "top.qcow2"
    (tmp_path / "secret").write_bytes(b"a passphrase")
    options = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,backing_file={base.name},backing_fmt=raw"
    secret = f"secret,id=s,file={tmp_path / 'secret'}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, "-o", options, top, str(SIZE))
    content = bytearray(top.read_bytes())
    content[88] |= 0x80
    top.write_bytes(content)
    base.unlink()
    assert "backing file" in await _refused(tmp_path, ImageSpec(str(top), "qcow2", secret=b"a passphrase"))
    assert top.read_bytes() == content


@needs_qemu
@pytest.mark.parametrize("name", ["../out.data", "nbd:x", "absent.data"])
async def test_a_data_file_outside_the_roots_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    top = folder / "top.qcow2"
    create(top, SIZE, options="data_file=inside.data")
    content = bytearray(top.read_bytes())
    at = content.index(b"inside.data")
    padded = name.encode().ljust(len(b"inside.data"), b"\0")
    length_at = at - 4
    content[length_at : length_at + 4] = len(name).to_bytes(4, "big")
    content[at : at + len(padded)] = padded
    top.write_bytes(content)
    _raw(tmp_path / "out.data", b"s")
    (folder / "inside.data").unlink()
    message = await _refused(folder, _spec(top))
    assert "data file" in message
    assert repr(name) in message


@needs_qemu
async def test_an_image_is_not_its_own_data_file(tmp_path: Path) -> None:
    top = tmp_path / "a.qcow2"
    create(top, SIZE, options="data_file=b.qcow2")
    (tmp_path / "b.qcow2").unlink()
    (tmp_path / "b.qcow2").hardlink_to(top)
    for read_only in (False, True):
        await _refused(tmp_path, _spec(top, read_only=read_only))


@needs_qemu
async def test_a_data_file_is_opened_with_its_image(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    create(top, SIZE, options="data_file=top.data")
    node = await open_image(_spec(top))
    await node.write(0, b"in the data file")
    await node.close()
    assert (tmp_path / "top.data").read_bytes().startswith(b"in the data file")
    other = _raw(tmp_path / "other.data", b"o")
    node = await open_image(_spec(top, data_file=_spec(other, "raw"), read_only=True))
    assert await node.read(0, 4) == b"oooo"
    await node.close()


async def test_raw_has_no_snapshots(tmp_path: Path) -> None:
    path = _raw(tmp_path / "disk.raw", b"r")
    message = await _refused(tmp_path, _spec(path, "raw", snapshot="one"), kind=ConfigError)
    assert "'one'" in message


@needs_qemu
async def test_a_snapshot_is_served_read_only_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, SIZE)
    qemu_io(path, "qcow2", [f"write -q -P 1 0 {SIZE}"])
    run("qemu-img", "snapshot", "-c", "first", path)
    qemu_io(path, "qcow2", [f"write -q -P 2 0 {SIZE}"])
    node = await open_image(_spec(path, snapshot="first"))
    assert node.read_only
    assert await node.read(0, 2) == b"\1\1"
    await node.close()
    assert "second" in await _refused(tmp_path, _spec(path, snapshot="second"))


@pytest.mark.parametrize("fields", [{"offset": 512}, {"size": 512}])
async def test_a_window_of_a_backing_image_is_for_raw_ones(tmp_path: Path, fields: dict[str, Any]) -> None:
    path, base = await _make(tmp_path / "disk.qcow2"), await _make(tmp_path / "base.qcow2")
    assert "raw" in await _refused(tmp_path, _spec(path, backing=_spec(base, **fields)), kind=ConfigError)


async def test_a_window_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = _raw(tmp_path / "disk.raw", b"r", 4096)
    assert "offset" in await _refused(tmp_path, _spec(path, "raw", offset=8192))
    disk = await _make(tmp_path / "disk.qcow2")
    assert "offset" in await _refused(tmp_path, _spec(disk, offset=SIZE + 512))
    assert "size" in await _refused(tmp_path, _spec(disk, None, offset=512, size=SIZE))


@pytest.mark.parametrize("what", ["directory", "absent", "fifo"])
async def test_what_is_no_image_file_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "thing"
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    assert str(path) in await _refused(tmp_path, _spec(path, "raw", read_only=True))


async def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = _raw(tmp_path / "disk", b"r", 4096)
    assert "nonsense" in await _refused(tmp_path, _spec(path, "nonsense"), kind=ConfigError)


async def test_a_format_without_a_driver_is_not_served_as_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DRIVERS, "luks")
    path = tmp_path / "disk"
    path.write_bytes(b"LUKS\xba\xbe\0\1".ljust(4096, b"\0"))
    assert "luks" in await _refused(tmp_path, _spec(path, None), kind=ConfigError)


async def test_a_probed_raw_image_is_guarded_and_a_declared_one_is_not(tmp_path: Path) -> None:
    header = (await _make(tmp_path / "other.qcow2")).read_bytes()[:512]
    path = _raw(tmp_path / "disk", b"\0", MIB)
    node = await open_image(_spec(path, None))
    assert node.format == "raw"
    with pytest.raises(RequestError):
        await node.write(0, header)
    await node.close()
    node = await open_image(_spec(path, "raw"))
    await node.write(0, header)
    await node.close()
    node = await open_image(_spec(path, "raw"))
    assert (node.format, node.size) == ("raw", MIB), "it stays what it was declared to be"
    await node.close()


async def test_a_probed_qcow2_is_opened_as_such_but_not_one_in_a_backing_file_declared_raw(tmp_path: Path) -> None:
    secret = _raw(tmp_path / "secret.raw", b"s")
    planted = await _make(tmp_path / "planted", secret.name, "raw")
    top = await _make(tmp_path / "top.qcow2", planted.name, "raw")
    node = await open_image(_spec(top, None, read_only=True))
    assert [layer.name for layer in node.layers] == ["qcow2", "raw"]
    assert await node.read(0, 4) == b"QFI\xfb"
    await node.close()


async def test_an_overlay_takes_the_writes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = _raw(tmp_path / "disk.raw", b"r", SIZE + 100)
    before = _state(tmp_path)
    node = await open_image(_spec(path, "raw", overlay=True))
    assert not node.read_only
    await node.write(1000, b"temporary")
    await node.flush()
    assert await node.read(998, 13) == b"rrtemporaryrr"
    assert await node.read(SIZE + 98, 2) == b"rr"
    await node.close()
    assert _state(tmp_path) == before


async def test_opening_and_closing_read_only_changes_nothing(tmp_path: Path) -> None:
    _raw(tmp_path / "base.raw", b"b")
    top = await _make(tmp_path / "top.qcow2", "base.raw", "raw")
    before = _state(tmp_path)
    node = await open_image(_spec(top, read_only=True))
    assert await node.read(0, SIZE) == b"b" * SIZE
    await node.flush()
    await node.close()
    assert _state(tmp_path) == before


async def test_a_file_in_use_elsewhere_is_refused_unless_shared(tmp_path: Path) -> None:
    path = _raw(tmp_path / "disk.raw", b"r")
    node = await open_image(_spec(path, "raw"))
    with pytest.raises(ImageError, match=str(path)):
        await open_image(_spec(path, "raw"))
    shared = await open_image(_spec(path, "raw", read_only=True, force_share=True))
    await shared.close()
    await node.close()


async def test_an_image_in_no_directory_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none" / "image")
    with pytest.raises(ImageError, match=f"^{path}: cannot be opened: No such file or directory"):
        await open_image(ImageSpec(path))
