"""Naming another parent in a descriptor: every crash leaves the old one or the new one, and stock tools agree."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.base import BackingReference
from nbdserve.formats.vmdk.descriptor import NO_PARENT, Descriptor, ExtentLine, build_descriptor
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.formats.vmdk.parent import Step, plan_parent
from nbdserve.units import KIB, MIB, SECTOR_SIZE
from tests.formats.vmdk.files import content, driver_of, node_of, qemu_io, stock
from tests.support import images
from tests.support.images import needs_qemu
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay

ROOM = 20 * SECTOR_SIZE
NAMES = ["b.vmdk", "/dir/" * 60 + "b", None, "n" * 700, "n" * 701, "c.vmdk", "p" * 300, "q" * 1000, None, "last"]


def text(name: str | None, extents: int = 1) -> bytes:
    """A descriptor as others write it."""
    return build_descriptor(
        cid=0xABC,
        parent_cid=7 if name else NO_PARENT,
        create_type="twoGbMaxExtentSparse" if extents > 1 else "monolithicSparse",
        parent_name=name,
        extents=[ExtentLine("RW", 4192256, "SPARSE", f"disk-s{number:03d}.vmdk") for number in range(extents)],
        size=MIB,
        adapter_type="ide",
        hw_version="4",
        tools_version="2147483647",
    )


def left_by_a_crash(old: bytes, steps: list[Step], rng: random.Random) -> list[list[bytes]]:
    """For each step, what a crash before it is stable may leave; the last is what there is at the end."""
    current = bytearray(old.ljust(ROOM, b"\0"))
    found = []
    for at, data in steps:
        sectors = range(0, len(data), SECTOR_SIZE)
        choices = list(itertools.product((False, True), repeat=min(4, len(sectors))))
        states = []
        for chosen in choices:
            state = bytearray(current)
            written = (
                {*rng.sample(range(len(sectors)), sum(chosen))}
                if len(sectors) > 4
                else set(itertools.compress(range(len(sectors)), chosen))
            )
            for number in written:
                first = number * SECTOR_SIZE
                state[at + first : at + first + SECTOR_SIZE] = data[first : first + SECTOR_SIZE]
            states.append(bytes(state))
        found.append(states)
        current[at : at + len(data)] = data
    return [*found, [bytes(current)]]


def facts(data: bytes) -> Descriptor:
    """What counts."""
    return replace(Descriptor.parse(data, "x"), cid_at=None)


@pytest.mark.parametrize("extents", [1, 4])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_crash_leaves_the_old_parent_or_the_new_one(extents: int, end: str) -> None:
    rng = random.Random(extents)
    old = text(None, extents).replace(b"\n", end.encode())
    cid = refused = 0
    for name in NAMES:
        before = facts(old)
        cid += 1
        try:
            new, steps = plan_parent(old, ROOM, name, NO_PARENT if name is None else cid)
        except ConfigError as error:
            assert "shorter" in str(error)
            assert len(name or "") + len(before.parent_name or "") > 300
            refused += 1
            continue
        after = replace(before, parent_name=name, parent_cid=NO_PARENT if name is None else cid)
        *staged, last, end_state = left_by_a_crash(old, steps, rng)
        for state in itertools.chain(*staged):
            assert facts(state) == before
        assert {facts(state) == after for state in last} == {False, True}
        assert all(facts(state) in (before, after) for state in last)
        assert facts(end_state[0]) == facts(new) == after
        assert end_state[0].rstrip(b"\0") == new
        old = new
    assert refused <= 3
    assert b"ddb.adapterType" in old


def test_a_name_that_is_not_longer_takes_the_place_of_the_old_one() -> None:
    """Where the extents leave no room in the first sector, nothing moves."""
    old = text("a name of some length.vmdk", 40)
    for name in ("short", None):
        new, steps = plan_parent(old, MIB, name, 5)
        assert len(steps) == 1
        assert len(new) == len(old)
        assert facts(new).extents == facts(old).extents
        assert facts(new).parent_name == name
    with pytest.raises(ConfigError, match="shorter"):
        plan_parent(old, MIB, "a name longer than the one there is.vmdk", 5)
    long = text("o" * 800)
    new, steps = plan_parent(long, ROOM, "short", 5)
    assert [at for at, _ in steps] == [0]
    assert (facts(new).parent_name, facts(new).extents) == ("short", facts(long).extents)


def test_what_cannot_be_said() -> None:
    old = text(None)
    for name in ('a"b', "a\nb", "n" * 1024):
        with pytest.raises(ConfigError, match="cannot be written"):
            plan_parent(old, ROOM, name, 5)
    with pytest.raises(ConfigError, match="512"):
        plan_parent(old, 512, "n" * 200, 5)
    with pytest.raises(ConfigError, match="content ID"):
        plan_parent(b'version=1\ncreateType="x"\n', ROOM, "b", 5)


def test_a_descriptor_without_the_lines_gets_them() -> None:
    new, _ = plan_parent(b'version=1\nCID=12\ncreateType="monolithicSparse"\n', ROOM, "b", 5)
    assert new == b'version=1\nCID=12\nparentCID=00000005\ncreateType="monolithicSparse"\nparentFileNameHint="b"\n'


async def test_a_crash_of_the_driver(tmp_path: Path) -> None:
    base = ByteStorage(bytearray(), "base")
    await VmdkDriver.create(base, MIB, {})
    parent = await VmdkDriver.open(base, {}, read_only=True)
    image = ByteStorage(bytearray(), "top")
    await VmdkDriver.create(image, MIB, {})
    recorder = Recorder(seed=5)
    driver = await VmdkDriver.open(recorder.storage(image.content), {}, read_only=False)
    names, marks = [None], []
    for name in [*NAMES[:4], "end"]:
        try:
            await driver.set_backing(None if name is None else BackingReference(name, "vmdk"), parent)
        except ConfigError:
            continue
        names.append(name)
        marks.append(len(recorder.log))
    assert len(names) >= 4
    for state in Replay(recorder, None, 5).states(200):
        step = sum(mark < state.position for mark in marks)
        reader = await VmdkDriver.open(ByteStorage(state.contents[0]), {}, read_only=True)
        assert (reader.backing and reader.backing.name) in names[max(0, step - 1) : step + 2], str(state)
        if reader.backing is not None:
            reader.accept_backing(parent)
    await driver.close()


@needs_qemu
@pytest.mark.parametrize("options", ["", "subformat=twoGbMaxExtentSparse", "zeroed_grain=on"])
async def test_stock_reads_through_every_parent(tmp_path: Path, options: str) -> None:
    size = MIB
    parents = [tmp_path / "a.vmdk", tmp_path / ("n" * 200 + ".vmdk")]
    for number, path in enumerate(parents):
        stock(path, size)
        qemu_io(path, f"write -P {number + 1} 0 128k")
    path = stock(tmp_path / "top.vmdk", size, options, backing="a.vmdk")
    qemu_io(path, "write -P 9 0 64k")
    for number in (2, 0, 1, 0, 2, 1):
        parent = parents[number - 1] if number else None
        driver = await driver_of(path)
        opened = None if parent is None else await driver_of(parent, read_only=True)
        await driver.set_backing(None if parent is None else BackingReference(parent.name, "vmdk"), opened)
        await driver.close()
        if opened is not None:
            await opened.close()
        assert images.info(path, "vmdk").get("backing-filename") == (parent and parent.name)
        images.check(path, "vmdk")
        wanted = b"\x09" * 64 * KIB + bytes([number]) * 64 * KIB
        assert content(path)[: 128 * KIB] == wanted
        qemu_io(path, "write -P 9 0 4k")  # and it writes the descriptor, too
        node = await node_of(path)
        assert await node.read(0, 128 * KIB) == wanted
        await node.close()


async def test_a_flat_image_has_no_parent(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB, "subformat=monolithicFlat")
    parent = await driver_of(stock(tmp_path / "b.vmdk", MIB), read_only=True)
    before = path.read_bytes()
    driver = await driver_of(path)
    with pytest.raises(ConfigError, match="flat"):
        await driver.set_backing(BackingReference("b.vmdk", "vmdk"), parent)
    with pytest.raises(ConfigError, match="has to be opened"):
        await driver.set_backing(BackingReference("b.vmdk", "vmdk"))
    await driver.close()
    await parent.close()
    assert path.read_bytes() == before
