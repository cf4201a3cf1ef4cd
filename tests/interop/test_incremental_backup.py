"""A chain of backups over NBD with real tools: nbdcopy for the full one, libnbd for what a bitmap says changed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.exports.export import Export
from nbdserve.units import KIB
from tests.interop.test_libnbd_api import PYTHON
from tests.interop.tools import make_disk
from tests.server.clients import serving

SCRIPT = Path(__file__).with_name("libnbd_backup.py")
WRITES = 40


async def tool(*argv: str | Path) -> str:
    """What it prints; it must succeed. The server is in this process, so it is waited for without blocking."""
    process = await asyncio.create_subprocess_exec(
        *map(str, argv), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, f"{argv}: {out.decode()}{err.decode()}"
    return out.decode()


def changing(source: random.Random, size: int) -> list[str]:
    """qemu-io's commands for some writes, zeroes and discards, many at a time."""
    commands = []
    for _ in range(WRITES):
        length = source.choice([512, 4 * KIB, 60 * KIB, 200 * KIB])
        offset = source.randrange((size - length) // 512) * 512
        commands.append(
            source.choice(
                [
                    f"aio_write -P {source.randrange(1, 255)} {offset} {length}",
                    f"aio_write -z -u {offset} {length}",
                    f"discard {offset} {length}",
                    f"write -f -P {source.randrange(1, 255)} {offset} {length}",
                ]
            )
        )
    return [*commands, "aio_flush"]


async def write_through(uri: str, commands: list[str]) -> None:
    await tool("qemu-io", "-f", "raw", "-d", "unmap", *(word for command in commands for word in ("-c", command)), uri)


async def whole(node: Node) -> bytes:
    return bytes(await node.read(0, node.size))


@pytest.mark.parametrize("kind", ["raw", "chain"])
async def test_a_chain_of_incremental_backups(tmp_path: Path, content: bytes, kind: str) -> None:
    """Three increments; clients go on writing while the second is made, which the third brings over."""
    source = random.Random(kind)
    image, image_format = make_disk(tmp_path, kind, content)
    node = await open_image(ImageSpec(str(image), image_format, discard="unmap"))
    copy = tmp_path / "copy.raw"
    copy.write_bytes(bytes(node.size))
    recording = node.bitmaps.add("since0", 64 * KIB)
    async with serving(tmp_path, Export("a", node)) as served:
        await tool("nbdcopy", f"nbd+unix:///a?socket={served.path}", copy)
    assert copy.read_bytes() == await whole(node)
    moment = b""
    for increment in range(1, 4):
        export = Export("a", node)
        (tmp_path / f"w{increment}").mkdir()
        async with serving(tmp_path / f"w{increment}", export) as served:
            await write_through(f"nbd+unix:///a?socket={served.path}", changing(source, node.size))
        # the end of one epoch is the beginning of the next
        async with node.drained():
            recording.disabled = True
            done, recording = recording, node.bitmaps.add(f"since{increment}", 64 * KIB)
            moment = await whole(node)
        (tmp_path / f"b{increment}").mkdir()
        async with serving(tmp_path / f"b{increment}", Export("a", node, bitmaps=[done])) as served:
            uri = f"nbd+unix:///a?socket={served.path}"
            backup = tool(PYTHON, SCRIPT, uri, f"qemu:dirty-bitmap:{done.name}", copy)
            if increment == 2:
                await asyncio.gather(backup, write_through(uri, changing(source, node.size)))
            else:
                brought = int(await backup)
                assert 0 < brought <= done.count() < node.size
                if increment == 1:
                    assert copy.read_bytes() == moment
        node.bitmaps.discard(done)
    assert copy.read_bytes() == await whole(node) == moment
    await node.close()
