"""Internal snapshots, made, applied and deleted in turns with qemu-img; both find the same in the image."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_WAIT
from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.formats.qcow2.engine import check, content, create, open_image, qemu_io, read, run, write
from tests.support.images import needs_qemu

pytestmark = needs_qemu

ROUNDS = int(os.environ.get("NBDSERVE_SNAPSHOT_ROUNDS", "1"))
SHAPES = {
    "512": ("cluster_size=512", 256 * KIB, False),
    "4k-rb64": ("cluster_size=4k,refcount_bits=64", MIB, False),
    "v2": ("compat=0.10,cluster_size=4k", MIB, False),
    "ext": ("extended_l2=on,cluster_size=16k", MIB, False),
    "compressed": ("cluster_size=4k", MIB, True),
    "64k-backing": ("", 2 * MIB, False),
}


class _Pair:
    """An image and what is expected of it."""

    def __init__(self, folder: Path, shape: str, seed: int) -> None:
        self.rng = random.Random(f"{shape}/{seed}")
        options, self.size, compressed = SHAPES[shape]
        self.path = folder / "a.qcow2"
        self.disk = bytearray(self.size)
        self.snapshots: dict[str, bytes] = {}
        self.names = 0
        self.sized = "0.10" not in options
        if "backing" in shape:
            base = folder / "base"
            base.write_bytes(self.rng.randbytes(MIB))
            self.disk[:MIB] = base.read_bytes()
            create(self.path, self.size, options, "-b", base, "-F", "raw")
        elif compressed:
            source = folder / "source"
            self.disk[: MIB // 2] = bytes(range(256)) * 2048
            source.write_bytes(self.disk)
            run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, self.path)
        else:
            create(self.path, self.size, options)

    async def write(self) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            length = 512 * self.rng.randrange(1, 120)
            offset = 512 * self.rng.randrange(max(1, (self.size - length) // 512))
            length = min(length, self.size - offset)
            byte = self.rng.randrange(1, 256)
            self.disk[offset : offset + length] = bytes([byte]) * length
            if self.rng.random() < 0.5:
                qemu_io(self.path, f"write -P {byte} {offset} {length}")
            else:
                driver = await open_image(self.path)
                backing = (self.path.parent / "base").read_bytes() if (self.path.parent / "base").exists() else b""
                await write(driver, offset, bytes([byte]) * length, backing)
                await driver.close()

    async def create(self) -> None:
        self.names += 1
        name = f"s{self.names}"
        await self._change("-c", name)
        self.snapshots[name] = bytes(self.disk)

    async def apply(self) -> None:
        if self.snapshots:
            name = self.rng.choice(sorted(self.snapshots))
            await self._change("-a", name)
            self.disk = bytearray(self.snapshots[name])
            self.size = len(self.disk)

    async def delete(self) -> None:
        if self.snapshots:
            name = self.rng.choice(sorted(self.snapshots))
            await self._change("-d", name)
            del self.snapshots[name]

    async def resize(self) -> None:
        if self.sized:
            self.size = max(512, self.size + 512 * self.rng.randrange(-200, 200))
            driver = await open_image(self.path)
            await driver.resize(self.size)
            await driver.close()
            self.disk = self.disk[: self.size].ljust(self.size, b"\0")

    async def _change(self, verb: str, name: str) -> None:
        if self.rng.random() < 0.3:
            run("qemu-img", "snapshot", verb, name, self.path)
            return
        driver = await open_image(self.path, read_only=False)
        if verb == "-c":
            await driver.create_snapshot(name)
        elif verb == "-a":
            await driver.apply_snapshot(name)
        else:
            (found,) = (snapshot for snapshot in driver.snapshots if snapshot.name == name)
            await driver.delete_snapshot(found.id)
        assert (await driver.check()).messages == []
        # The driver goes on, as under a running server.
        offset = 512 * self.rng.randrange(max(1, driver.size // 512 - 9))
        before = (await read(driver, offset, 512, bytes(self._backing()))).ljust(512, b"\0")
        await write(driver, offset, before, self._backing())
        await driver.close()

    def _backing(self) -> bytes:
        base = self.path.parent / "base"
        return base.read_bytes() if base.exists() else b""

    def judge(self) -> None:
        found = check(self.path)
        assert not found.get("leaks")
        assert content(self.path) == bytes(self.disk)
        for name, expected in self.snapshots.items():
            seen = content(self.path, "-l", f"snapshot.name={name}")
            length = min(len(seen), len(expected))
            assert seen[:length] == expected[:length], name


@pytest.mark.parametrize("shape", SHAPES)
async def test_in_turns_with_qemu_img(tmp_path: Path, shape: str) -> None:
    for seed in range(ROUNDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        pair = _Pair(folder, shape, seed)
        for step in range(14):
            verb = pair.rng.choice(("write", "write", "create", "create", "apply", "delete", "resize"))
            await getattr(pair, verb)()
            if step % 3 == 2 or step == 13:
                pair.judge()


async def test_a_snapshot_is_written_as_qemu_img_writes_it(tmp_path: Path) -> None:
    ours, theirs = create(tmp_path / "a.qcow2", MIB), create(tmp_path / "b.qcow2", MIB)
    driver = await open_image(ours)
    made = await driver.create_snapshot("one", icount=0)
    assert (made.id, made.name, made.disk_size, made.vm_state_size) == ("1", "one", MIB, 0)
    assert (await driver.create_snapshot("one", icount=0)).id == "2", "a name may be used again"
    await driver.delete_snapshot("1")
    assert (await driver.create_snapshot("three")).id == "3"
    await driver.close()
    for verb, name in (("-c", "one"), ("-c", "one"), ("-d", "one"), ("-c", "three")):
        run("qemu-img", "snapshot", verb, name, theirs)
    a, b = (run("qemu-img", "snapshot", "-l", path).splitlines() for path in (ours, theirs))
    assert [line.split()[:4] for line in a] == [line.split()[:4] for line in b]


async def test_space_that_nothing_uses_any_more_is_given_back(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 8 * MIB)
    qemu_io(path, "write -P 1 0 8M")
    driver = await open_image(path)
    await driver.create_snapshot("one")
    await driver.close()
    qemu_io(path, "write -P 2 0 8M")
    used = path.stat().st_blocks
    driver = await open_image(path)
    await driver.delete_snapshot("1")
    await driver.close()
    assert path.stat().st_blocks * 512 < used * 512 - 7 * MIB
    for number in range(8):  # and used again: the file does not grow with each change
        driver = await open_image(path)
        await driver.create_snapshot(f"n{number}")
        await driver.delete_snapshot("1")
        await driver.close()
    assert path.stat().st_size < 18 * MIB
    check(path)
    assert content(path) == b"\x02" * 8 * MIB


async def test_a_driver_opened_to_look_can_make_one(tmp_path: Path) -> None:
    """As the command line does it: bitmaps stay valid, for the disk stays what it is."""
    path = create(tmp_path / "a.qcow2", MIB)
    run("qemu-img", "bitmap", "--add", path, "dirty")
    qemu_io(path, "write -P 1 0 1M")
    storage = await FileStorage.open(str(path))
    from nbdserve.formats.qcow2.driver import Qcow2Driver  # noqa: PLC0415  (of this test alone)

    driver = await Qcow2Driver.open(storage, {}, read_only=True)
    await driver.create_snapshot("one")
    await driver.close()
    check(path)
    assert "dirty" in run("qemu-img", "info", path)
    assert "in-use" not in run("qemu-img", "info", path)


@pytest.mark.parametrize("state", ["--enable", "--disable"])
async def test_none_is_applied_below_bitmaps(state: str, tmp_path: Path) -> None:
    """As QEMU: they would say of another disk what has changed."""
    path = create(tmp_path / "a.qcow2", MIB)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "bitmap", "--add", state, path, "dirty")
    before = path.read_bytes()
    storage = await FileStorage.open(str(path))
    from nbdserve.formats.qcow2.driver import Qcow2Driver  # noqa: PLC0415  (of this test alone)

    driver = await Qcow2Driver.open(storage, {}, read_only=True)
    with pytest.raises(ConfigError, match=r"Device has active dirty bitmaps.*\(dirty\)"):
        await driver.apply_snapshot("one")
    await driver.close()
    assert path.read_bytes() == before


async def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = create(tmp_path / "a.qcow2", MIB, "refcount_bits=1")
    qemu_io(path, "write -P 1 0 1M")
    before = path.read_bytes()
    driver = await open_image(path)
    with pytest.raises(ConfigError, match="1 bits count up to 1"):
        await driver.create_snapshot("one")
    with pytest.raises(ConfigError, match="255"):
        await driver.create_snapshot("x" * 256)
    with pytest.raises(ImageError, match="nix"):
        await driver.apply_snapshot("nix")
    with pytest.raises(ImageError, match="17"):
        await driver.delete_snapshot("17")
    await driver.close()
    assert path.read_bytes() == before
    external = create(tmp_path / "b.qcow2", MIB, "data_file=b.raw")
    driver = await open_image(external)
    with pytest.raises(RequestError, match="external data file"):
        await driver.create_snapshot("one")
    await driver.close()


async def test_an_image_with_errors_is_to_be_repaired_first(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 1 0 1M")
    data = bytearray(path.read_bytes())
    data[0x20000 + 2 * 5 : 0x20000 + 2 * 8] = bytes(6)  # counts of data clusters
    path.write_bytes(data)
    driver = await open_image(path)
    with pytest.raises(CorruptImageError, match="check -r all"):
        await driver.create_snapshot("one")
    await driver.close()
    assert path.read_bytes() == data


async def test_under_clients_that_write_on(tmp_path: Path) -> None:
    """As the server does it: inside ``drained``, and what the node remembers of places is renewed."""
    path = create(tmp_path / "a.qcow2", MIB, "cluster_size=4k")
    node = Node([await open_image(path)])
    rng, stop, kept = random.Random(1), asyncio.Event(), list[bytes]()

    async def client(byte: int) -> None:
        while not stop.is_set():
            offset, length = rng.randrange(MIB - 65536), rng.randrange(1, 65536)
            if node.submit_write(offset, memoryview(bytes([byte]) * length), lambda error: None) == WRITE_WAIT:
                await node.write(offset, bytes([byte]) * length)
            await asyncio.sleep(0)

    clients = [asyncio.create_task(client(byte)) for byte in range(1, 5)]
    for number in range(4):
        await asyncio.sleep(0.05)
        async with node.drained():
            kept.append(bytes(await node.read(0, MIB)))
            await node.top.create_snapshot(f"s{number}")
            await node.reshape(node.layers)
    async with node.drained():
        await node.top.apply_snapshot("s1")
        await node.top.delete_snapshot("1")
        await node.reshape(node.layers)
        assert await node.read(0, MIB) == kept[1]
    await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*clients)
    last = await node.read(0, MIB)
    await node.close()
    assert not check(path).get("leaks")
    assert content(path) == last
    for number, expected in enumerate(kept[1:], 1):
        assert content(path, "-l", f"snapshot.name=s{number}") == expected


async def test_tables_that_cannot_be_read_again_are_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in memory may be free space by now: nothing is read from there."""
    path = create(tmp_path / "a.qcow2", MIB, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 1M")
    driver = await open_image(path)
    assert await read(driver, 0, 512) == b"\1" * 512

    async def fail(storage: FileStorage) -> None:
        raise OSError(errno.EIO, "a bad sector")

    with monkeypatch.context() as patched:
        patched.setattr("nbdserve.formats.qcow2.image.read_header", fail)
        with pytest.raises(OSError, match="a bad sector"):
            await driver.create_snapshot("s")
    with pytest.raises(RequestError, match="tables were replaced, and cannot be read"):
        await read(driver, 0, 512)
    with pytest.raises(RequestError, match="tables were replaced, and cannot be read"):
        await write(driver, 0, b"2" * 512)
    await driver.close()
    assert content(path) == b"\1" * MIB
    check(path)
