"""cloop images as ``create_compressed_fs`` makes them, built here because no stock tool of QEMU writes them."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.cli.image.map import rows
from nbdserve.errors import ImageError, RequestError
from nbdserve.extents import COMPRESSED
from nbdserve.formats.cloop import HEADER, MAX_BLOCK_SIZE, CloopDriver
from nbdserve.formats.probe import format_of
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.support import images

SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


def build(content: bytes, block_size: int, *, level: int = 6) -> bytes:
    """``content`` is whole blocks."""
    blocks = [zlib.compress(content[at : at + block_size], level) for at in range(0, len(content), block_size)]
    offset = HEADER.sizeof() + 8 * (len(blocks) + 1)
    offsets = []
    for block in blocks:
        offsets.append(offset)
        offset += len(block)
    head = SCRIPT.ljust(128, b"\0") + struct.pack(f">II{len(blocks) + 1}Q", block_size, len(blocks), *offsets, offset)
    return head + b"".join(blocks)


def content(size: int, seed: int = 1) -> bytes:
    """Text, noise and zeroes."""
    rng = random.Random(seed)
    pieces = [rng.choice((bytes(3000), b"cloop " * 500, rng.randbytes(3000))) for _ in range(size // 3000 + 1)]
    return b"".join(pieces)[:size]


async def open_image(data: bytes) -> CloopDriver:
    return await CloopDriver.open(MemoryStorage(data, path="disk.cloop"), {}, read_only=True)


@images.needs_qemu
@pytest.mark.parametrize("block_size", [512, 64 * KIB, 66 * KIB + 512, 1 << 20])
async def test_the_disk_is_the_one_qemu_img_reads(tmp_path: Path, block_size: int) -> None:
    wanted = content(block_size * 7)
    path = tmp_path / "disk.cloop"
    path.write_bytes(build(wanted, block_size))
    assert images.info(path)["format"] == "cloop"
    assert images.raw_content(path, "cloop", tmp_path) == wanted
    driver = await open_image(path.read_bytes())
    assert driver.size == images.info(path)["virtual-size"]
    node = Node([driver])
    assert await node.read(0, node.size) == wanted
    rng = random.Random(block_size)
    for _ in range(50):
        offset = rng.randrange(node.size)
        length = min(node.size - offset, rng.choice((1, 512, 100_000)))
        assert await node.read(offset, length) == wanted[offset : offset + length]


def test_it_is_probed() -> None:
    assert format_of(build(bytes(512), 512)) == "cloop"


async def test_the_map_has_each_block() -> None:
    driver = await open_image(build(content(3 * 4096), 4096))
    offsets = struct.unpack_from(">3Q", build(content(3 * 4096), 4096), 136)
    runs = [
        row
        async for part in driver.iter_runs(100, 9000)
        for row in zip(
            part.start.tolist(), part.length.tolist(), part.kind.tolist(), part.host_offset.tolist(), strict=True
        )
    ]
    assert runs == [
        (100, 3996, COMPRESSED, offsets[0]),
        (4096, 4096, COMPRESSED, offsets[1]),
        (8192, 808, COMPRESSED, offsets[2]),
    ]
    assert [driver.lookup(start, length) for start, length, _, _ in runs] == [
        run[2:3] + run[1:2] + run[3:] for run in runs
    ]
    found = [part.tolist() async for part in rows(Node([driver]), 0, driver.size)]
    assert sum(len(part) for part in found) == 3


async def test_an_image_without_blocks() -> None:
    driver = await open_image(build(b"", 512))
    assert driver.size == 0
    assert [part async for part in driver.iter_runs(0, 0)] == []


async def test_it_is_never_written() -> None:
    with pytest.raises(ImageError, match="can only be read"):
        await CloopDriver.open(MemoryStorage(build(bytes(512), 512)), {}, read_only=False)
    assert not CloopDriver.can("allocate")
    assert not CloopDriver.can("create")


IMAGE = build(content(4 * 4096), 4096)


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (0, b"#!/bin/sh\n#V3.0 Format\n", "header"),
        (128, struct.pack(">I", 0), "block_size"),
        (128, struct.pack(">I", 513), "block_size"),
        (128, struct.pack(">I", MAX_BLOCK_SIZE + 512), "block_size"),
        (128, struct.pack(">I", 1 << 31), "block_size"),
        (132, struct.pack(">I", 1 << 20), "n_blocks"),
        (132, struct.pack(">I", 0xFFFFFFFF), "n_blocks"),
        (136, struct.pack(">Q", len(IMAGE) + 1), "offsets[0]"),
        (144, struct.pack(">Q", 1), "offsets[1]"),
        (144, struct.pack(">Q", 1 << 63), "offsets[1]"),
        (168, struct.pack(">Q", len(IMAGE) + 1), "offsets[4]"),
    ],
)
async def test_a_bad_field_is_named(at: int, value: bytes, field: str) -> None:
    with pytest.raises(ImageError) as caught:
        await open_image(IMAGE[:at] + value + IMAGE[at + len(value) :])
    assert caught.value.field == field
    assert str(caught.value).startswith("disk.cloop: ")


async def test_a_block_that_is_stored_in_too_much_space() -> None:
    data = struct.pack(">II2Q", 512, 1, 152, 152 + (1 << 20))
    with pytest.raises(ImageError, match=r"offsets\[1\]"):
        await open_image(SCRIPT.ljust(128, b"\0") + data + bytes(1 << 20))


@pytest.mark.parametrize("length", [0, 127, 135, 140, len(IMAGE) - 1])
async def test_a_short_file(length: int) -> None:
    with pytest.raises(ImageError):
        await open_image(IMAGE[:length])


async def test_damaged_blocks_are_errors_and_the_others_are_read() -> None:
    first, second = struct.unpack_from(">2Q", IMAGE, 136)
    data = bytearray(IMAGE)
    data[second - 3] ^= 1  # in the checksum of the first block
    node = Node([await open_image(bytes(data))])
    with pytest.raises(RequestError, match=f"at {first:#x}: compressed data"):
        await node.read(0, 512)
    assert await node.read(4096, 3 * 4096) == content(4 * 4096)[4096:]


async def test_a_bomb_makes_no_more_than_its_block() -> None:
    bomb = zlib.compress(bytes(8 << 20))
    data = struct.pack(">II2Q", 512 * 64, 1, 152, 152 + len(bomb)) + bomb
    node = Node([await open_image(SCRIPT.ljust(128, b"\0") + data)])
    with pytest.raises(RequestError, match="more than 32768 bytes"):
        await node.read(0, 512)
