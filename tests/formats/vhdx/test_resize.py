"""Growing images: what is new is zeroes, and a power failure leaves the old size or the new one."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import ConfigError, RequestError
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.layout import FULLY_PRESENT
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, MIB, TIB
from tests.formats.vhdx.helpers import (
    agrees,
    child_of,
    driver_of,
    finish,
    made,
    node_of,
    node_on,
    parent_and_child,
    put_entry,
    qemu_image,
    random_changes,
    stored,
)
from tests.support import images
from tests.support.images import needs_qemu
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay


@needs_qemu
@pytest.mark.parametrize("steps", [(4 * MIB, 9 * MIB), (4 * MIB + 512, 4 * MIB + 1024, 20 * MIB + 512), (0, 3 * MIB)])
@pytest.mark.parametrize(
    "options", ["block_size=1M", "block_size=8M,block_state_zero=off", "subformat=fixed,block_size=2M"]
)
async def test_qemu_takes_the_grown_disk(tmp_path: Path, options: str, steps: tuple[int, ...]) -> None:
    path = qemu_image(tmp_path / "a.vhdx", steps[0], options)
    model = bytearray(steps[0])
    for seed, size in enumerate(steps[1:]):
        node = await node_of(path)
        if model:
            await random_changes(node, model, 30, seed)
        await driver_of(node).resize(size)
        await node.close()
        model.extend(bytes(size - len(model)))
        images.check(path, "vhdx")
        assert images.info(path)["virtual-size"] == size
        assert images.raw_content(path, "vhdx", tmp_path) == model
        node = await node_of(path)
        await random_changes(node, model, 30, seed + 10)
        await agrees(driver_of(node))
        assert await node.read(0, size) == model
        await node.close()
        images.check(path, "vhdx")
        assert images.raw_content(path, "vhdx", tmp_path) == model


async def test_a_disk_that_is_open_goes_on() -> None:
    storage = await made(4 * MIB)
    driver = await VhdxDriver.open(storage, {}, read_only=False)
    await Node([driver]).write(0, b"before")
    await driver.resize(8 * MIB)
    node = Node([driver])
    assert node.size == 8 * MIB
    await node.write(7 * MIB, b"after")
    assert await node.read(0, 6) == b"before"
    await finish(node)
    again = await node_on(storage, read_only=True)
    assert await again.read(7 * MIB, 5) == b"after"
    assert await again.read(0, 6) == b"before"


@pytest.mark.parametrize("options", ["block_size=1M", "block_size=1M,block_state_zero=off"])
async def test_the_table_moves_when_it_is_full(options: str) -> None:
    """1 MiB of table is 128 GiB of disk in blocks of 1 MiB; the place it leaves is used for blocks."""
    storage = await made(120 * GIB, options)
    node = await node_on(storage)
    places = [0, 5 * GIB, 120 * GIB - 5]
    for at in places:
        await node.write(at, b"older")
    driver = driver_of(node)
    before = driver.structure.bat
    await driver.resize(300 * GIB)
    assert driver.structure.bat.offset > before.offset
    assert driver.structure.bat.length == 3 * MIB
    size = storage.size
    grown = Node([driver])
    await grown.write(299 * GIB, b"newer")
    await finish(grown)
    assert storage.size == size
    again = await node_on(storage, read_only=True)
    for at in places:
        assert await again.read(at, 5) == b"older"
    assert await again.read(299 * GIB, 5) == b"newer"
    assert await again.read(200 * GIB, 5) == bytes(5)
    assert (await again.top.check()).corruptions == 0


async def test_what_lay_past_the_end_does_not_show() -> None:
    """Neither in the last block, nor in entries of the table that stood for nothing."""
    for options in ("block_size=1M", "block_size=1M,subformat=fixed"):
        storage = await made(2 * MIB + 512, options)
        node = await node_on(storage)
        await node.write(2 * MIB, b"x" * 512)
        await finish(node)
        structure = await read_structure(storage)
        entry = int.from_bytes(stored(storage)[structure.bat.offset + 16 :][:8], "little")
        await storage.write((entry >> 20 << 20) + 512, b"\xee" * (MIB - 512))
        await put_entry(storage, 3, entry | FULLY_PRESENT)
        await put_entry(storage, 4, 5)
        node = await node_on(storage)
        await driver_of(node).resize(6 * MIB)
        await finish(node)
        again = await node_on(storage, read_only=True)
        assert await again.read(2 * MIB, 4 * MIB) == b"x" * 512 + bytes(4 * MIB - 512)
        assert (await again.top.check()).corruptions == 0


@pytest.mark.parametrize("options", ["block_size=1M", "block_size=4M"])
@pytest.mark.parametrize("written", ["nothing", "part", "whole"])
async def test_a_longer_parent_does_not_show(options: str, written: str) -> None:
    parent, _, content = await parent_and_child(12 * MIB)
    node = await node_on(parent)
    await node.write(0, b"\x99" * (12 * MIB))
    await finish(node)
    child = await child_of(parent, 5 * MIB + 512, options)
    model = bytearray(b"\x99" * (5 * MIB + 512))
    node = await node_on(child, parent)
    if written != "nothing":
        start = 5 * MIB + (256 if written == "part" else -4 * MIB)
        await node.write(start, b"!" * (5 * MIB + 512 - start))
        model[start:] = b"!" * (5 * MIB + 512 - start)
    assert await node.read(0, node.size) == model
    driver = driver_of(node)
    await driver.resize(10 * MIB)
    model.extend(bytes(10 * MIB - len(model)))
    assert await Node([driver, *node.layers[1:]]).read(0, 10 * MIB) == model
    await finish(node)
    again = await node_on(child, parent, read_only=True)
    assert await again.read(0, 10 * MIB) == model
    assert (await again.top.check()).corruptions == 0
    assert content


async def test_what_cannot_be() -> None:
    storage = await made(4 * MIB)
    node = await node_on(storage)
    before = stored(storage)
    with pytest.raises(ConfigError, match="smaller"):
        await driver_of(node).resize(4 * MIB - 512)
    with pytest.raises(ConfigError, match="64 TiB"):
        await driver_of(node).resize(64 * TIB + 1)
    await driver_of(node).resize(4 * MIB)
    assert stored(storage) == before
    below = await made(8 * MIB)
    node = await node_on(await made(4 * MIB + 512, "block_size=1M,block_state_zero=off"), below, has_backing=True)
    with pytest.raises(ConfigError, match="layer below"):
        await driver_of(node).resize(8 * MIB)


async def test_the_largest_disk() -> None:
    storage = await made(2 * TIB, "block_state_zero=off")
    node = await node_on(storage)
    await driver_of(node).resize(64 * TIB)
    grown = Node(node.layers)
    await grown.write(64 * TIB - 3, b"end")
    await finish(grown)
    again = await node_on(storage, read_only=True)
    assert again.size == 64 * TIB
    assert await again.read(64 * TIB - 4, 4) == b"\0end"


@pytest.mark.parametrize("done", [1, 2, 3])
async def test_one_that_fails_in_the_middle_is_finished_by_who_opens_the_image_next(
    monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    storage = await made(120 * GIB, "block_size=1M")
    node = await node_on(storage)
    await node.write(0, b"before")
    await node.flush()
    write_all = storage.write_all

    async def some(pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        if len(pieces) == 1:  # an entry of the log
            return await write_all(pieces)
        await write_all(pieces[:done])
        raise OSError(errno.EIO, "failed")

    async def stay_open() -> None:
        pass

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_all", some)
        with pytest.raises(OSError, match="failed"):
            await node.resize(300 * GIB)
        with pytest.raises(RequestError, match="could not be changed, open it anew"):
            await node.top.resize(300 * GIB)
        patched.setattr(storage, "close", stay_open)
        await node.close()
    again = await node_on(storage)
    assert again.size == 300 * GIB
    assert await again.read(0, 6) == b"before"
    await again.write(300 * GIB - 5, b"after")
    await finish(again)
    assert (await driver_of(await node_on(storage, read_only=True)).check()).corruptions == 0


@pytest.mark.parametrize("kind", ["dynamic", "moved", "fixed", "differencing"])
async def test_every_crash_leaves_one_size_or_the_other(kind: str) -> None:
    size, wanted = 3 * MIB + 512, 5 * MIB
    parent: MemoryStorage | None = None
    if kind == "differencing":
        parent, plain, content = await parent_and_child(size)
    else:
        if kind == "moved":
            size, wanted = 128 * GIB, 129 * GIB
        subformat = ",subformat=fixed" if kind == "fixed" else ",block_state_zero=off"
        plain, content = await made(size, f"block_size=1M{subformat}"), bytearray(min(size, 4 * MIB))
    for seed in range(1):
        recorder = Recorder(seed)
        storage = recorder.storage(stored(plain))
        layers: list[Any] = [storage] if parent is None else [storage, parent]
        node = await node_on(*layers)
        rng = random.Random(seed)
        model = bytearray(content)
        for _ in range(4):
            at = rng.randrange(len(model) - 4096)
            await node.write(at, b"\x5a" * 4096)
            model[at : at + 4096] = b"\x5a" * 4096
        await node.flush()
        begun = len(recorder.log)
        await driver_of(node).resize(wanted)
        ended = len(recorder.log)
        sizes = set()
        for state in Replay(recorder, None, seed).states(80):
            left = ByteStorage(bytearray(state.contents[0]), "left")
            again = await node_on(*([left] if parent is None else [left, parent]), read_only=True)
            assert again.size in (size, wanted), str(state)
            if state.position > ended:
                assert again.size == wanted, str(state)
            if state.position > begun:
                sizes.add(again.size)
                assert await again.read(0, len(model)) == model, str(state)
                rest = min(again.size, len(model) + 2 * MIB) - len(model)
                assert await again.read(len(model), rest) == bytes(rest), str(state)
                assert (await again.top.check()).corruptions == 0, str(state)
        assert sizes == {size, wanted}
