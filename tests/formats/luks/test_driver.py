"""The luks driver against QEMU: what one writes, the other reads."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import open_layer
from nbdserve.cli.image.info import _collect, as_json, as_text
from nbdserve.errors import ConfigError, CorruptImageError, ImageError
from nbdserve.extents import DATA
from nbdserve.formats.luks.driver import LuksDriver
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.formats.encryption.stock import QUICK, SECRET, Stock, options_of
from tests.support import images

pytestmark = images.needs_qemu
PAYLOAD = 2068480

CIPHERS = [
    "",
    "cipher-alg=aes-128,ivgen-alg=plain",
    "cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-alg=aes-192,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512",
    "cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha1",
    "cipher-mode=cbc,ivgen-alg=plain,hash-alg=ripemd160",
]


def spec(path: Path, **changes: Any) -> ImageSpec:
    return ImageSpec(str(path), "luks", **{"secret": SECRET} | changes)


def choose(options: str) -> str:
    return f"key-secret=s,{QUICK},{options}".rstrip(",")


@pytest.mark.parametrize("options", CIPHERS[::2])
async def test_what_qemu_made_is_read_and_written(tmp_path: Path, options: str) -> None:
    stock, rng = Stock(tmp_path), random.Random(options)
    model = bytearray(rng.randbytes(MIB))
    path = stock.fill(stock.create("a.luks", "luks", choose(options), "1M"), "luks", model)
    node = await open_image(spec(path))
    assert node.size == len(model)
    assert await node.read(0, node.size) == model
    for _ in range(60):
        length = rng.choice([1, 512, 700, 4096, 70_000, 140_000])
        offset = rng.randrange(len(model) - length)
        data = bytes(length) if rng.random() < 0.2 else rng.randbytes(length)
        if any(data):
            await node.write(offset, data)
        else:
            await node.zero(offset, length)
        model[offset : offset + length] = data
    assert await node.read(0, node.size) == model
    await node.flush()
    await node.close()
    assert stock.content(path, "luks") == model
    stock.io(path, "luks", "write -P 7 1000 5000", "write -P 9 300k 70k")
    model[1000:6000], model[300 * KIB : 370 * KIB] = b"\7" * 5000, b"\x09" * 70 * KIB
    node = await open_image(spec(path, read_only=True))
    assert await node.read(0, node.size) == model
    await node.close()


@pytest.mark.parametrize("options", CIPHERS)
async def test_what_we_make_qemu_reads_and_writes(tmp_path: Path, options: str) -> None:
    stock, path = Stock(tmp_path), tmp_path / "ours.luks"
    storage = await FileStorage.open(str(path), create=True)
    chosen = options_of(choose(options))
    LuksDriver.validate_create(MIB, chosen)
    await LuksDriver.create(storage, MIB, chosen, secret=SECRET)
    await storage.close()
    stock.io(path, "luks", "write -P 5 0 1M", "write -P 6 100k 3k")
    node = await open_image(spec(path, read_only=True))
    assert await node.read(0, MIB) == b"\5" * 100 * KIB + b"\6" * 3 * KIB + b"\5" * (MIB - 103 * KIB)
    await node.close()


@pytest.mark.parametrize("options", ["", "cipher-mode=cbc,ivgen-alg=essiv"])
async def test_both_make_the_same(tmp_path: Path, options: str) -> None:
    theirs, ours = Stock(tmp_path).create("theirs.luks", "luks", choose(options), "1M"), tmp_path / "ours.luks"
    storage = await FileStorage.open(str(ours), create=True)
    await LuksDriver.create(storage, MIB, options_of(choose(options)), secret=SECRET)
    await storage.close()
    assert ours.stat().st_size == theirs.stat().st_size
    assert described(images.info(ours)) == described(images.info(theirs))


def described(facts: dict[str, Any]) -> dict[str, Any]:
    """What two volumes made alike have in common."""
    for key in ("filename", "actual-size"):
        del facts[key]
    data = facts["format-specific"]["data"]
    data["uuid"] = len(data["uuid"])
    assert data["slots"][0].pop("iters") >= 1000
    assert data.pop("master-key-iters") >= 1000
    return facts


async def test_info_is_that_of_qemu_img_and_needs_no_secret(tmp_path: Path) -> None:
    path = Stock(tmp_path).create("a.luks", "luks", choose("cipher-mode=cbc,ivgen-alg=essiv"), "1M")
    (shown,) = await _collect(ImageSpec(str(path)), False, None)
    assert as_text(shown) == images.run("qemu-img", "info", path)
    assert as_json(shown) == images.info(path)
    layer = await open_layer(str(path), None)
    facts, theirs = layer.info(), images.info(path)
    assert facts.encrypted is theirs["encrypted"] is True
    assert (facts.format, facts.virtual_size) == (theirs["format"], theirs["virtual-size"])
    assert json.dumps(facts.specific, sort_keys=True) == json.dumps(theirs["format-specific"]["data"], sort_keys=True)
    assert facts.cluster_size is None
    assert "cluster-size" not in theirs
    await layer.close()
    with pytest.raises(ImageError, match="no secret is given"):
        await open_image(ImageSpec(str(path), "luks"))
    with pytest.raises(ImageError, match="opens none"):
        await open_image(spec(path, secret=b"wrong"))


@pytest.mark.parametrize("size", [PAYLOAD, PAYLOAD + 1, PAYLOAD + 511, PAYLOAD + 512, PAYLOAD + 1000])
async def test_sizes_are_counted_as_qemu_counts_them(tmp_path: Path, size: int) -> None:
    path = Stock(tmp_path).create("a.luks", "luks", choose(""), "1M")
    os.truncate(path, size)
    layer = await open_layer(str(path), "luks")
    assert layer.size == images.info(path)["virtual-size"] == (size - PAYLOAD + 511) // 512 * 512
    await layer.close()


async def test_a_file_that_ends_before_the_payload(tmp_path: Path) -> None:
    path = Stock(tmp_path).create("a.luks", "luks", choose(""), "1M")
    os.truncate(path, PAYLOAD - 512)
    with pytest.raises(CorruptImageError) as caught:
        await open_layer(str(path), "luks")
    assert (caught.value.field, caught.value.value) == ("LUKS payload offset sector", PAYLOAD // 512)


async def test_every_byte_is_data_without_an_offset_that_means_anything(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = stock.create("a.luks", "luks", choose(""), "1M")
    node = await open_image(spec(path))
    driver = node.top
    assert driver.lookup(5, 100) == driver.lookup_writable(5, 100) == (DATA, 100, 5)
    assert not driver.data.can_send(0, 4096)
    rows = [
        (int(runs.start[0]), int(runs.length[0]), int(runs.kind[0]), int(runs.host_offset[0]))
        async for runs in driver.iter_runs(0, driver.size)
    ]
    assert rows == [(0, MIB, DATA, -1)]
    assert stock.map(path, "luks") == [
        {"start": 0, "length": MIB, "depth": 0, "present": True, "zero": False, "data": True}
    ]
    await node.close()


async def test_resizing_keeps_what_is_there(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = stock.fill(stock.create("a.luks", "luks", choose(""), "1M"), "luks", b"x" * MIB)
    node = await open_image(spec(path))
    await node.top.resize(2 * MIB)
    assert node.top.size == 2 * MIB
    await node.close()
    assert images.info(path)["virtual-size"] == 2 * MIB
    node = await open_image(spec(path))
    assert await node.read(0, MIB) == b"x" * MIB
    await node.top.resize(4096)
    await node.close()
    assert stock.content(path, "luks") == b"x" * 4096


async def test_a_failed_creation_is_no_volume() -> None:
    storage = MemoryStorage(b"old")
    for secret, options, problem in (
        (None, {}, "needs a secret"),
        (b"\xff", {}, "UTF-8"),
        (b"x", {"cipher-alg": "des"}, "cipher-alg=des"),
        (b"x", {"backing_file": "b"}, "no backing file"),
    ):
        with pytest.raises(ConfigError, match=problem):
            await LuksDriver.create(storage, MIB, options, secret=secret)
        assert await storage.read(0, storage.size) == b"old"
    with pytest.raises(ConfigError, match="at most"):
        LuksDriver.validate_create(1 << 63, {})
    assert LuksDriver.created_size(1, {}) == 512


async def test_a_read_only_open_changes_nothing(tmp_path: Path) -> None:
    path = Stock(tmp_path).create("a.luks", "luks", choose(""), "1M")
    before = path.read_bytes()
    node = await open_image(spec(path, read_only=True))
    await node.read(0, 64 * KIB)
    with pytest.raises(OSError, match="read-only"):
        await node.write(0, bytes(512))
    await node.close()
    assert path.read_bytes() == before
