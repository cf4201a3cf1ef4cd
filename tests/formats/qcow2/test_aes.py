"""qcow2 with the legacy AES encryption, as QEMU makes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import open_layer
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.aes import AesDriver, AesSubclusterDriver
from nbdserve.units import KIB, MIB
from tests.formats.encryption.stock import AES, SECRET, Stock
from tests.support import images

pytestmark = images.needs_qemu

SHAPES = ["", "cluster_size=512,compat=0.10", "extended_l2=on,cluster_size=16k", "cluster_size=2M"]


def spec(path: Path, **changes: Any) -> ImageSpec:
    return ImageSpec(str(path), "qcow2", **{"secret": SECRET} | changes)


async def scribble(path: Path, model: bytearray, rng: random.Random) -> None:
    node = await open_image(spec(path, discard="unmap"))
    assert isinstance(node.top, AesDriver | AesSubclusterDriver)
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
        if rng.random() < 0.3:
            offset = rng.randrange(len(model) - 200_000)
            assert await node.read(offset, 200_000) == model[offset : offset + 200_000]
    assert await node.read(0, node.size) == model
    await node.close()


@pytest.mark.parametrize("options", SHAPES)
async def test_what_one_writes_the_other_reads(tmp_path: Path, options: str) -> None:
    stock, rng = Stock(tmp_path), random.Random(options)
    model = bytearray(rng.randbytes(512 * KIB) + bytes(512 * KIB))
    path = stock.create("a.qcow2", "qcow2", f"{AES},{options}".rstrip(","), "1M")
    stock.fill(path, "qcow2", model, "aes")
    node = await open_image(spec(path, read_only=True))
    assert await node.read(0, MIB) == model
    await node.close()
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2", "aes") == model
    stock.check(path, "aes")
    stock.io(path, "qcow2", "write -P 7 1000 5000", "write -P 9 800k 100k", method="aes")
    model[1000:6000], model[800 * KIB : 900 * KIB] = b"\7" * 5000, b"\x09" * 100 * KIB
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2", "aes") == model
    stock.check(path, "aes")


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
async def test_snapshots_and_compressed_clusters(tmp_path: Path, options: str) -> None:
    stock, rng = Stock(tmp_path), random.Random(3)
    path = stock.create("a.qcow2", "qcow2", f"{AES},{options}".rstrip(","), "1M")
    first = bytearray(rng.randbytes(MIB))
    stock.fill(path, "qcow2", first, "aes")
    stock.io(path, "qcow2", "discard 128k 64k", "write -c -P 5 128k 64k", method="aes")
    first[128 * KIB : 192 * KIB] = b"\5" * 64 * KIB
    images.run(
        "qemu-img", "snapshot", "-c", "first", *stock.secret, "--image-opts", stock.options(path, "qcow2", "aes")
    )
    model = bytearray(first)
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2", "aes") == model
    stock.check(path, "aes")
    node = await open_image(spec(path, snapshot="first"))
    assert await node.read(0, MIB) == first
    await node.close()


async def test_info_needs_no_secret_and_the_disk_does(tmp_path: Path) -> None:
    path = Stock(tmp_path).create("a.qcow2", "qcow2", AES, "1M")
    layer = await open_layer(str(path), None)
    facts, theirs = layer.info(), images.info(path)
    await layer.close()
    assert facts.encrypted is theirs["encrypted"] is True
    assert facts.specific == theirs["format-specific"]["data"]
    with pytest.raises(ImageError, match="no secret is given"):
        await open_image(ImageSpec(str(path), "qcow2", read_only=True))


async def test_another_passphrase_reads_noise_as_with_qemu(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = stock.create("a.qcow2", "qcow2", AES, "1M")
    stock.io(path, "qcow2", "write -P 7 0 64k", method="aes")
    node = await open_image(spec(path, secret=b"wrong", read_only=True))
    assert await node.read(0, 512) != b"\7" * 512
    assert await node.read(64 * KIB, 512) == bytes(512)
    await node.close()
