"""What the tests of the VHD driver share: stock tools, and images made and scribbled on."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.storage.file import FileStorage


def run(*command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run a stock tool; its output."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode in codes, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def stock(path: Path, size: int | str, options: str = "") -> Path:
    """An image made by qemu-img."""
    run("qemu-img", "create", "-q", "-f", "vpc", *(["-o", options] if options else []), path, str(size))
    return path


def qemu_io(path: Path, *commands: str) -> None:
    """Run qemu-io commands on an image."""
    run("qemu-io", "-f", "vpc", "-t", "unsafe", *[word for command in commands for word in ("-c", command)], path)


def same_as_stock(path: Path, content: bytes | bytearray) -> None:
    """qemu-img reads ``content``."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(content)
    run("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, raw)
    raw.unlink()


async def make(path: Path, size: int, parent: Path | None = None, **options: str) -> Path:
    """An image made by the driver."""
    backing = None
    if parent is not None:
        options |= {"backing_file": parent.name, "backing_fmt": "vpc"}
        backing = await open_driver(parent, read_only=True)
    storage = await FileStorage.open(str(path), create=True)
    try:
        await VpcDriver.create(storage, size, options, backing=backing)
    finally:
        await storage.close()
        if backing is not None:
            await backing.close()
    return path


async def open_driver(path: Path, *, read_only: bool = False, **options: Any) -> VpcDriver:
    """The driver on the file ``path``."""
    storage = await FileStorage.open(str(path), read_only=read_only)
    try:
        return await VpcDriver.open(storage, {"has_backing": True} | options, read_only=read_only)
    except BaseException:
        await storage.close()
        raise


async def open_node(path: Path, *, read_only: bool = False, discard: str = "unmap") -> Node:
    """The chain as it is served."""
    return await open_image(ImageSpec(str(path), "vpc", read_only=read_only, discard=discard))


async def content(path: Path) -> bytes:
    """What the guest sees, read by the driver."""
    node = await open_node(path, read_only=True)
    try:
        return bytes(await node.read(0, node.size))
    finally:
        await node.close()


async def scribble(path: Path, model: bytearray, seed: int, count: int, unit: int = 1) -> None:
    """Random writes, zeroes, discards and flushes, multiples of ``unit`` bytes, on the image and the model alike."""
    rng = random.Random(seed)
    node = await open_node(path)
    try:
        assert node.size == len(model)
        for _ in range(count):
            offset = rng.randrange(len(model)) // unit * unit
            length = min(rng.choice((1, 512, 4096, 30000, 300000)), len(model) - offset)
            length = min(-(-length // unit) * unit, len(model) - offset)
            action = rng.random()
            if action < 0.7:
                data = rng.randbytes(length)
                await node.write(offset, data)
                model[offset : offset + length] = data
            elif action < 0.85:
                await node.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            else:
                await node.flush()
        assert await node.read(0, node.size) == model
    finally:
        await node.close()
