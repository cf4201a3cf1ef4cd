"""Another parent for formats that keep its identity: the content that shows is that of the old one or of the new."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbdserve.block.node import Node
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.base import BackingReference, FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, SECTOR_SIZE
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay

FORMATS = {"vmdk": {}, "vpc": {"block_size": "65536"}, "vhdx": {"block_size": "1M"}}
SIZE = 1280 * KIB
OWN = [(512, 1024), (70 * KIB, 4096), (200 * KIB, 64 * KIB), (SIZE - 512, 512)]
"""Where the image has something: ``(offset, length)``. What VMDK has less than a grain of it fills from the parent."""
LONG = "directory/" * 20 + "b"


async def _parent(name: str, letter: bytes) -> bytes:
    """An image full of ``letter``."""
    storage = MemoryStorage()
    await driver_for(name).create(storage, SIZE, {"force_size": "on"} if name == "vpc" else {})
    node = Node([await driver_for(name).open(storage, {}, read_only=False)])
    await node.write(0, letter * SIZE)
    await node.flush()
    content = bytes(await storage.read(0, storage.size))
    await node.close()
    return content


async def _open(name: str, content: bytes | bytearray, **options: Any) -> FormatDriver:
    return await driver_for(name).open(ByteStorage(bytearray(content)), options, read_only=True)


async def _image(name: str, parent: bytes) -> bytes:
    """One on ``parent``, ``a``, with something of its own."""
    storage, below = MemoryStorage(), await _open(name, parent)
    options = FORMATS[name] | {"backing_file": "a", "backing_fmt": name}
    await driver_for(name).create(storage, SIZE, options, backing=below)
    node = Node([await driver_for(name).open(storage, {}, read_only=False), below])
    for offset, length in _own(name):
        await node.write(offset, b"o" * length)
    await node.flush()
    content = bytes(await storage.read(0, storage.size))
    await node.close()
    return content


async def _shown(name: str, content: bytes | bytearray, parents: dict[str, bytes]) -> tuple[str | None, bytes]:
    """The parent's name, and what the guest sees. ImageError if the parent is refused."""
    top = await _open(name, content)
    layers = [top]
    if top.backing is not None:
        layers.append(await _open(name, parents[top.backing.name]))
        top.accept_backing(layers[1])
    return top.backing and top.backing.name, bytes(await Node(layers).read(0, SIZE))


def _own(name: str) -> list[tuple[int, int]]:
    if name != "vmdk":
        return OWN
    grain = 64 * KIB
    return [(offset // grain * grain, grain) for offset, _ in OWN]


def _expected(name: str, parent: bytes) -> bytes:
    """What is here, over a disk full of ``parent``."""
    content = bytearray(parent * SIZE)
    for offset, length in _own(name):
        content[offset : offset + length] = b"o" * length
    return bytes(content)


@pytest.mark.parametrize("name", FORMATS)
async def test_a_crash_leaves_the_old_parent_or_the_new_one(name: str) -> None:
    parents = {letter: await _parent(name, letter.encode()) for letter in "ab"}
    parents[LONG] = parents["b"]
    image = await _image(name, parents["a"])
    recorder = Recorder(seed=1)
    storage = recorder.storage(image)
    driver = await driver_for(name).open(storage, {}, read_only=False)
    names = ["b", "a", LONG, "b", None, "a"]
    shown, marks = [await _shown(name, image, parents)], []
    assert shown[0] == ("a", _expected(name, b"a"))
    for wanted in names:
        reference = None if wanted is None else BackingReference(wanted, name)
        await driver.set_backing(reference, None if wanted is None else await _open(name, parents[wanted]))
        assert driver.backing == driver.info().backing == reference
        marks.append(len(recorder.log))
        shown.append(await _shown(name, storage.content, parents))
    parent_of = {None: b"\0", "a": b"a", "b": b"b", LONG: b"b"}
    assert shown[1:6] == [(wanted, _expected(name, parent_of[wanted])) for wanted in names[:5]]
    assert shown[6][0] == "a"
    states = 0
    for state in Replay(recorder, None, 1).states(150):
        step = sum(mark < state.position for mark in marks)
        found = await _shown(name, state.contents[0], parents)
        allowed = shown[max(0, step - 1) : step + 2]
        if found not in allowed and name == "vhdx" and found[0] in ("b", None):
            assert _is_mixed(found[1], shown[4][1], shown[5][1]), str(state)
            continue
        assert found in allowed, f"{state}: {found[0]}"
        result = await (await _open(name, state.contents[0], has_backing=True)).check()
        assert not result.corruptions, f"{state}: {result.messages}"
        states += 1
    assert states > 50
    await driver.close()
    assert (await _shown(name, storage.content, parents)) == shown[6]
    result = await (await _open(name, storage.content, has_backing=True)).check()
    assert not result.corruptions
    assert not result.leaks


def _is_mixed(found: bytes, first: bytes, second: bytes) -> bool:
    """Whether each sector is that of one of the two: what shows of a parent goes block by block."""
    rows = [np.frombuffer(data, np.uint8).reshape(-1, SECTOR_SIZE) for data in (found, first, second)]
    return bool(((rows[0] == rows[1]).all(1) | (rows[0] == rows[2]).all(1)).all())


@pytest.mark.parametrize("name", FORMATS)
async def test_an_image_without_a_parent_gets_one(name: str) -> None:
    parent = await _parent(name, b"p")
    storage = ByteStorage(bytearray())
    options = FORMATS[name] | ({"force_size": "on"} if name == "vpc" else {})
    if name == "vhdx":
        options["block_state_zero"] = "off"  # blocks that say that they are zeroes would go on saying so
    await driver_for(name).create(storage, SIZE, options)
    driver = await driver_for(name).open(storage, {}, read_only=False)
    node = Node([driver])
    await node.write(512, b"o" * 512)
    await node.flush()
    here = driver.lookup(0, SIZE)
    assert here is not None
    await driver.set_backing(BackingReference("p", name), await _open(name, parent))
    await node.close()
    found, seen = await _shown(name, storage.content, {"p": parent})
    assert found == "p"
    unit = here[1] if here[1] < SIZE else 1 << 20
    assert seen[:unit] == bytes(512) + b"o" * 512 + bytes(unit - 1024)
    assert seen[unit:] == b"p" * (SIZE - unit)
    result = await (await _open(name, storage.content, has_backing=True)).check()
    assert not result.corruptions, result.messages


@pytest.mark.parametrize("name", FORMATS)
async def test_what_cannot_be_a_parent_changes_nothing(name: str) -> None:
    parent = await _parent(name, b"a")
    image = await _image(name, parent)
    storage = ByteStorage(bytearray(image))
    driver = await driver_for(name).open(storage, {}, read_only=False)
    raw = await driver_for("raw").open(ByteStorage(bytearray(SIZE)), {}, read_only=True)
    below = await _open(name, parent)
    for wanted, backing in (("x", None), ("x", raw), ("n" * 70000, below)):
        with pytest.raises(ConfigError, match=r"memory|cannot|room"):
            await driver.set_backing(BackingReference(wanted, name), backing)
    assert driver.backing == BackingReference("a", name)
    await driver.close()
    assert await _shown(name, storage.content, {"a": parent}) == ("a", _expected(name, b"a"))
    other = await _parent(name, b"x")
    with pytest.raises(ImageError):
        await _shown(name, storage.content, {"a": other})


@pytest.mark.parametrize(("name", "options"), [("vpc", {"subformat": "fixed"}), ("vhdx", {"subformat": "fixed"})])
async def test_a_fixed_image_has_no_parent(name: str, options: dict[str, str]) -> None:
    storage = MemoryStorage()
    await driver_for(name).create(storage, SIZE, options)
    driver = await driver_for(name).open(storage, {}, read_only=False)
    with pytest.raises(ConfigError, match="fixed"):
        await driver.set_backing(BackingReference("a", name), await _open(name, await _parent(name, b"a")))
    await driver.set_backing(None)
    await driver.close()
