"""What the tests of the VHD driver share: stock tools, images made by hand, and a reader written from the specification
that shares nothing with the driver."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path
from typing import Any

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.storage.file import FileStorage

SECTOR = 512
NONE = 0xFFFF_FFFF


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


# --- by the specification --------------------------------------------------------------------------------------------


def checksum_of(data: bytes, at: int) -> int:
    return sum(byte for i, byte in enumerate(data) if not at <= i < at + 4) ^ 0xFFFF_FFFF


def footer_of(data: bytes) -> dict[str, int]:
    """The footer at the end of a file, which has to be right."""
    footer = data[-512:]
    assert footer[:8] == b"conectix"
    assert struct.unpack_from(">I", footer, 64)[0] == checksum_of(footer, 64)
    kind = struct.unpack_from(">I", footer, 60)[0]
    if kind != 2:
        assert data[:512] == footer, "the copy at the beginning differs"
    return {
        "type": kind,
        "size": struct.unpack_from(">Q", footer, 48)[0],
        "next": struct.unpack_from(">Q", footer, 16)[0],
    }


def blocks_of(data: bytes) -> tuple[int, list[int], list[bytes]]:
    """Block size, table, and the sector bitmap of each block that is there."""
    footer = footer_of(data)
    header = data[footer["next"] : footer["next"] + 1024]
    assert header[:8] == b"cxsparse"
    assert struct.unpack_from(">I", header, 36)[0] == checksum_of(header, 36)
    table_at, _, entries, block = struct.unpack_from(">QIII", header, 16)
    assert entries >= -(-footer["size"] // block)
    table = list(struct.unpack_from(f">{entries}I", data, table_at))
    size = max(512, block // 4096)
    return block, table, [data[at * 512 : at * 512 + size] if at != NONE else b"" for at in table]


def read_plainly(*chain: bytes) -> bytes:
    """The guest's content of an image and its parents, all of one size; bitmaps count in differencing images."""
    footer = footer_of(chain[0])
    size = footer["size"]
    if footer["type"] == 2:
        return chain[0][:size]
    below = read_plainly(*chain[1:]) if footer["type"] == 4 else bytes(size)
    result = bytearray(below)
    block, table, bitmaps = blocks_of(chain[0])
    for number, (place, bitmap) in enumerate(zip(table, bitmaps, strict=True)):
        if place == NONE:
            continue
        data_at = place * 512 + len(bitmap)
        for sector in range(block // 512):
            guest = number * block + sector * 512
            if guest < size and (footer["type"] == 3 or bitmap[sector // 8] >> (7 - sector % 8) & 1):
                result[guest : guest + 512] = chain[0][data_at + sector * 512 : data_at + (sector + 1) * 512]
    return bytes(result)
