from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.placed import placed
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import RequestError
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import raw_node
from tests.support.images import needs_qemu, run


@needs_qemu
async def test_what_is_read_at_the_places(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(base), "1M")
    run("qemu-io", "-c", "write -P 1 0 192k", str(base))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top), "2M")
    run("qemu-io", "-c", "write -P 2 64k 64k", "-c", "write -z 128k 64k", "-c", "write -P 3 1M 64k", str(top))
    node = await open_image(ImageSpec(str(top), "qcow2", read_only=True))
    content = await node.read(0, node.size)
    choose = random.Random(1)
    bounds = sorted(choose.randrange(2 * MIB) for _ in range(40))
    ranges = [(start, end - start) for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    expected = b"".join(content[offset : offset + length] for offset, length in ranges)
    async with placed(node, ranges) as reader:
        assert reader is not None
        position = 0
        while position < len(expected):
            buffer = bytearray(b"x" * choose.randrange(1, min(300 * KIB, len(expected) - position) + 1))
            reader.fill(memoryview(buffer))
            assert buffer == expected[position : position + len(buffer)]
            position += len(buffer)
    await node.close()


@needs_qemu
async def test_compressed_data_has_no_place(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    run("qemu-io", "-c", "write -P 1 0 64k", "-c", "write -c -P 2 64k 64k", str(path))
    node = await open_image(ImageSpec(str(path), "qcow2", read_only=True))
    for ranges, expected in (([(0, 64 * KIB)], True), ([(0, 64 * KIB), (64 * KIB, 512)], False)):
        async with placed(node, ranges) as reader:
            assert (reader is not None) == expected
    await node.close()


async def test_what_is_not_in_a_file_or_in_use_has_no_place(tmp_path: Path) -> None:
    memory = await raw_node(MemoryStorage(bytes(MIB)))
    async with placed(memory, [(0, 512)]) as reader:
        assert reader is None
    (tmp_path / "raw").write_bytes(bytes(MIB))
    node = await open_image(ImageSpec(str(tmp_path / "raw"), "raw", read_only=True))
    async with node.locks.exclusive(4096, 8192):
        async with placed(node, [(0, 512), (8000, 512)]) as reader:
            assert reader is None
        async with placed(node, [(0, 4096)]) as reader:
            assert reader is not None
    with pytest.raises(RequestError, match="not inside"):
        async with placed(node, [(0, 512), (MIB - 1, 2)]):
            pass
    await node.close()
