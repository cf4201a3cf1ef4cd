"""What the tests of the VHDX driver share: images of every kind, and their guest content."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbdserve.block.node import Node
from nbdserve.formats.vhdx.create import create_vhdx
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.structure import Structure, read_structure
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB
from tests.support import images


def qemu_image(path: Path, size: int, options: str = "") -> Path:
    """An image made by qemu-img."""
    images.create(path, size, fmt="vhdx", options=options)
    return path


async def made(size: int, options: str = "block_size=1M", *, sector_size: int = 512) -> MemoryStorage:
    """An image of ours in memory."""
    storage = MemoryStorage(path="image.vhdx")
    await create_vhdx(storage, size, parse(options), sector_size=sector_size)
    return storage


def parse(options: str) -> dict[str, str]:
    """As after ``-o``."""
    return dict(item.split("=", 1) for item in options.split(",") if item)


async def child_of(parent: Storage, size: int, options: str = "block_size=1M") -> MemoryStorage:
    """A differencing image on ``parent``, in memory."""
    storage = MemoryStorage(path="child.vhdx")
    chosen = parse(options) | {"backing_file": "parent.vhdx", "backing_fmt": "vhdx"}
    await create_vhdx(storage, size, chosen, await read_structure(parent))
    return storage


def copy(storage: MemoryStorage, path: str = "") -> MemoryStorage:
    """The same bytes, apart: what a crash would leave if everything were stable."""
    data = bytearray(storage.size)
    assert storage.try_read_into(0, memoryview(data))
    result = MemoryStorage(path=path or storage.path)
    for at in range(0, len(data), MIB):
        if any(data[at : at + MIB]):
            assert result.try_write(at, data[at : at + MIB])
    result.size = len(data)
    return result


def stored(storage: MemoryStorage) -> bytes:
    """Everything the file holds."""
    data = bytearray(storage.size)
    assert storage.try_read_into(0, memoryview(data))
    return bytes(data)


async def node_on(*storages: Storage, read_only: bool = False, **options: Any) -> Node:
    """The chain of images, top first."""
    layers: list[VhdxDriver] = []
    for storage in storages:
        layers.append(await VhdxDriver.open(storage, options, read_only=read_only or bool(layers)))
        if len(layers) > 1:
            layers[-2].accept_backing(layers[-1])
    return Node(layers, unmap=True)


async def node_of(path: Path, *, read_only: bool = False, **options: Any) -> Node:
    """The image in the file ``path``, without what is below it."""
    return await node_on(await FileStorage.open(str(path), read_only=read_only), read_only=read_only, **options)


def driver_of(node: Node) -> VhdxDriver:
    """Its top layer."""
    assert isinstance(node.top, VhdxDriver)
    return node.top


async def parent_and_child(
    size: int, options: str = "block_size=1M", *, sector_size: int = 512
) -> tuple[MemoryStorage, MemoryStorage, bytearray]:
    """A parent with random content, an empty child, and what both read as.

    The parent is one block: dissect.hypervisor does not divide what it reads of a parent where its blocks end.
    """
    parent = await made(size, "block_size=16M", sector_size=sector_size)
    node = await node_on(parent)
    rng = random.Random(size)
    for _ in range(6):
        offset = rng.randrange(size)
        await node.write(offset, rng.randbytes(min(size - offset, 300_000)))
    content = await node.read(0, size)
    await driver_of(node).flush()
    await finish(node)
    return parent, await child_of(parent, size, options), content


async def finish(node: Node) -> None:
    """What closing does to the top layer's file, which stays open."""
    await driver_of(node)._finish()


async def random_changes(node: Node, model: bytearray, count: int, seed: int) -> None:
    """Random writes, zeroes, discards, flushes and reads on the node and on the model alike."""
    rng = random.Random(seed)
    size = node.size
    for _ in range(count):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice((1, 511, 512, 4096, 5000, 100_000, MIB, 3 * MIB)))
        action = rng.random()
        if action < 0.5:
            data = rng.randbytes(length)
            await node.write(offset, data)
            model[offset : offset + length] = data
        elif action < 0.75:
            await node.zero(offset, length, unmap=action < 0.65)
            model[offset : offset + length] = bytes(length)
        elif action < 0.85:
            await node.flush()
        else:
            assert await node.read(offset, length) == model[offset : offset + length]


async def agrees(driver: VhdxDriver, start: int = 0, end: int | None = None) -> list[tuple[int, int, int, int]]:
    """``iter_runs`` is contiguous and says what ``lookup`` says; its rows."""
    end = driver.size if end is None else end
    rows: list[tuple[int, int, int, int]] = []
    async for piece in driver.iter_runs(start, end):
        columns: Sequence[Any] = (piece.start, piece.length, piece.kind, piece.host_offset)
        rows += zip(*(column.tolist() for column in columns), strict=True)
    position = start
    for run_start, length, kind, host_offset in rows:
        assert run_start == position
        assert length > 0
        while position < run_start + length:
            found = driver.lookup(position, run_start + length - position)
            if found is None:
                await driver.load(position)
                continue
            where = host_offset + position - run_start if host_offset >= 0 else -1
            assert (found[0], found[2]) == (kind, where)
            position += found[1]
    assert position == end
    return rows


def bat_entry(storage: MemoryStorage, structure: Structure, index: int) -> int:
    """An entry of the table as it is in the file."""
    return int.from_bytes(stored(storage)[structure.bat.offset + index * 8 :][:8], "little")


async def put(storage: Storage, offset: int, data: bytes) -> None:
    """Damage a file."""
    await storage.write(offset, data)


async def put_entry(storage: Storage, index: int, entry: int) -> None:
    """Change an entry of the table."""
    structure = await read_structure(storage)
    await storage.write(structure.bat.offset + index * 8, entry.to_bytes(8, "little"))
