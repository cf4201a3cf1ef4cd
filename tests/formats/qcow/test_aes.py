"""qcow with the legacy AES encryption, as QEMU makes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import open_layer
from nbdserve.errors import ImageError
from nbdserve.formats.qcow.aes import AesQcowDriver
from nbdserve.units import KIB, MIB
from tests.formats.encryption.stock import AES, SECRET, Stock
from tests.support import images

pytestmark = images.needs_qemu


def spec(path: Path, **changes: Any) -> ImageSpec:
    return ImageSpec(str(path), "qcow", **{"secret": SECRET} | changes)


async def scribble(path: Path, model: bytearray, rng: random.Random, **changes: Any) -> None:
    node = await open_image(spec(path, discard="unmap", **changes))
    assert isinstance(node.top, AesQcowDriver)
    assert not node.top.zeroes_fast
    for _ in range(60):
        length = rng.choice([1, 512, 700, 4096, 70_000, 140_000])
        offset = rng.randrange(len(model) - length)
        if rng.random() < 0.25:
            await node.zero(offset, length, unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            await node.write(offset, data)
            model[offset : offset + length] = data
        if rng.random() < 0.1:
            await node.flush()
    assert await node.read(0, node.size) == model
    await node.close()


async def test_what_one_writes_the_other_reads(tmp_path: Path) -> None:
    stock, rng = Stock(tmp_path), random.Random(1)
    model = bytearray(rng.randbytes(300 * KIB) + bytes(MIB - 300 * KIB))
    path = stock.create("a.qcow", "qcow", AES, "1M")
    stock.io(path, "qcow", "write -c -P 5 512k 4k", method="aes")
    for start in range(0, 300 * KIB, 100 * KIB):
        (tmp_path / "part").write_bytes(model[start : start + 100 * KIB])
        stock.io(path, "qcow", f"write -s {tmp_path / 'part'} {start} 100k", method="aes")
    model[512 * KIB : 516 * KIB] = b"\5" * 4 * KIB
    await scribble(path, model, rng)
    assert stock.content(path, "qcow", "aes") == model
    stock.io(path, "qcow", "write -P 7 1000 5000", "write -P 9 800k 100k", method="aes")
    model[1000:6000], model[800 * KIB : 900 * KIB] = b"\7" * 5000, b"\x09" * 100 * KIB
    await scribble(path, model, rng)
    assert stock.content(path, "qcow", "aes") == model


async def test_an_encrypted_layer_over_a_plain_one(tmp_path: Path) -> None:
    stock, rng = Stock(tmp_path), random.Random(8)
    base = tmp_path / "base"
    base.write_bytes(rng.randbytes(MIB))
    model = bytearray(base.read_bytes())
    path = stock.create("a.qcow", "qcow", AES, "1M", "-b", "base", "-F", "raw")
    await scribble(path, model, rng, backing=ImageSpec(str(base), "raw", read_only=True))
    assert stock.content(path, "qcow", "aes") == model


async def test_info_and_check_need_no_secret_and_the_disk_does(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = stock.create("a.qcow", "qcow", AES, "1M")
    stock.io(path, "qcow", "write -P 7 1000 5000", method="aes")
    layer = await open_layer(str(path), None)
    assert layer.info().encrypted is images.info(path)["encrypted"] is True
    assert (await layer.check()).corruptions == 0
    await layer.close()
    with pytest.raises(ImageError, match="no secret is given"):
        await open_image(ImageSpec(str(path), "qcow", read_only=True))


async def test_the_map_has_no_host_offsets(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = stock.create("a.qcow", "qcow", AES, "1M")
    stock.io(path, "qcow", "write -P 7 1000 5000", "write -P 8 512k 64k", method="aes")
    node = await open_image(spec(path, read_only=True))
    found = [
        row
        async for runs in node.top.iter_runs(0, MIB)
        for row in zip(runs.start.tolist(), runs.length.tolist(), runs.host_offset.tolist(), strict=True)
    ]
    await node.close()
    theirs = stock.map(path, "qcow", "aes")
    assert found == [(row["start"], row["length"], -1) for row in theirs]
