"""qcow2 with LUKS, against QEMU: what one writes, the other reads."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import open_layer
from nbdserve.cli.image.info import _collect, as_json, as_text
from nbdserve.cli.image.map import merged, rows
from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError, UnsupportedImageError
from nbdserve.extents import COMPRESSED
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.create import parse_options, plan_image
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.header import Header
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.formats.encryption.stock import LUKS, SECRET, Stock, options_of
from tests.support import images

pytestmark = images.needs_qemu

QUICK = "encrypt.format=luks,encrypt.iter-time=0"


def spec(path: Path, **changes: Any) -> ImageSpec:
    return ImageSpec(str(path), "qcow2", **{"secret": SECRET} | changes)


async def make(path: Path, size: int, options: str = "", companions: tuple[Path, ...] = ()) -> Path:
    """An image of ours."""
    storages = [await FileStorage.open(str(each), create=True) for each in (path, *companions)]
    chosen = options_of(f"{QUICK},{options}")
    await Qcow2Driver.create(storages[0], size, chosen, companions=storages[1:], secret=SECRET)
    for storage in storages:
        await storage.close()
    return path


async def scribble(path: Path, model: bytearray, rng: random.Random, **changes: Any) -> None:
    """Writes and zeroes of ours, all of which are read back."""
    node = await open_image(spec(path, discard="unmap", **changes))
    for _ in range(50):
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


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on,cluster_size=16k"])
async def test_what_qemu_made_is_read_and_written(tmp_path: Path, options: str) -> None:
    stock, rng = Stock(tmp_path), random.Random(options)
    model = bytearray(rng.randbytes(512 * KIB) + bytes(512 * KIB))
    path = stock.fill(stock.create("a.qcow2", "qcow2", f"{LUKS},{options}".rstrip(","), "1M"), "qcow2", model)
    node = await open_image(spec(path, read_only=True))
    assert await node.read(0, MIB) == model
    await node.close()
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2") == model
    stock.check(path)
    stock.io(path, "qcow2", "write -P 7 1000 5000", "write -z 300k 70k", "write -P 9 800k 100k")
    model[1000:6000], model[300 * KIB : 370 * KIB] = b"\7" * 5000, bytes(70 * KIB)
    model[800 * KIB : 900 * KIB] = b"\x09" * 100 * KIB
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2") == model
    stock.check(path)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10,encrypt.cipher-alg=aes-128",
        "cluster_size=512,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
        "extended_l2=on,encrypt.ivgen-alg=plain",
        "preallocation=metadata",
        "preallocation=full,extended_l2=on",
        "cluster_size=2M,refcount_bits=1",
    ],
)
async def test_what_we_make_qemu_reads_and_writes(tmp_path: Path, options: str) -> None:
    stock, rng = Stock(tmp_path), random.Random(options)
    path = await make(tmp_path / "a.qcow2", MIB, options)
    stock.check(path)
    assert stock.content(path, "qcow2") == bytes(MIB), "also what is preallocated"
    layer = await open_layer(str(path), None)
    assert (await layer.check()).corruptions == (await layer.check()).leaks == 0
    await layer.close()
    model = bytearray(MIB)
    model[100 * KIB : 103 * KIB] = b"\6" * 3 * KIB
    stock.io(path, "qcow2", "write -P 6 100k 3k")
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2") == model
    stock.check(path)


async def test_info_is_that_of_qemu_img_and_needs_no_secret(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    for path in (stock.create("a.qcow2", "qcow2", LUKS, "1M"), await make(tmp_path / "b.qcow2", MIB)):
        (shown,) = await _collect(ImageSpec(str(path)), False, None)
        assert as_text(shown) == images.run("qemu-img", "info", path)
        assert as_json(shown) == images.info(path)
        layer = await open_layer(str(path), None)
        facts, theirs = layer.info(), images.info(path)
        await layer.close()
        assert facts.encrypted is theirs["encrypted"] is True
        assert json.dumps(facts.specific, sort_keys=True) == json.dumps(
            theirs["format-specific"]["data"], sort_keys=True
        )
        with pytest.raises(ImageError, match="no secret is given"):
            await open_image(ImageSpec(str(path), "qcow2", read_only=True))
        with pytest.raises(ImageError, match="opens none"):
            await open_image(spec(path, secret=b"wrong"))


async def test_the_map_is_that_of_qemu_img(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = await make(tmp_path / "a.qcow2", MIB)
    stock.io(
        path, "qcow2", "write -P 6 100k 3k", "write -z 512k 128k", "write -P 1 128k 192k", "write -c -P 5 384k 64k"
    )
    node = await open_image(spec(path, read_only=True))
    found = [row async for part in merged(rows(node, 0, node.size)) for row in part.tolist()]
    await node.close()
    assert all(row[4] == -1 for row in found), "no host offset: the bytes there are not the guest's"
    theirs = stock.map(path, "qcow2")
    assert [(row["start"], row["length"]) for row in theirs] == [(row[0], row[1]) for row in found]


async def test_compressed_clusters_are_not_encrypted(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = await make(tmp_path / "a.qcow2", MIB)
    stock.io(path, "qcow2", "write -c -P 5 0 64k", "write -P 6 64k 64k")
    model = bytearray(b"\5" * 64 * KIB + b"\6" * 64 * KIB + bytes(MIB - 128 * KIB))
    node = await open_image(spec(path))
    assert node.top.lookup(0, 512) is None or node.top.lookup(0, 512)
    assert await node.read(0, MIB) == model
    run = node.top.lookup(0, 512)
    assert run is not None
    assert run[0] == COMPRESSED
    await node.write(1000, b"new")
    model[1000:1003] = b"new"
    assert await node.read(0, MIB) == model
    await node.close()
    assert stock.content(path, "qcow2") == model
    stock.check(path)


async def test_an_encrypted_layer_over_a_plain_one(tmp_path: Path) -> None:
    stock, rng = Stock(tmp_path), random.Random(8)
    base = tmp_path / "base"
    base.write_bytes(rng.randbytes(700 * KIB))
    model = bytearray(base.read_bytes() + bytes(MIB - 700 * KIB))
    path = await make(tmp_path / "a.qcow2", MIB, "backing_file=base,backing_fmt=raw,extended_l2=on")
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2") == model
    stock.check(path)


async def test_an_external_data_file_is_encrypted_by_its_own_sectors(tmp_path: Path) -> None:
    stock, rng = Stock(tmp_path), random.Random(8)
    model = bytearray(rng.randbytes(MIB))
    path = stock.create("a.qcow2", "qcow2", f"{LUKS},data_file=a.data", "1M")
    stock.fill(path, "qcow2", model)
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2") == model
    path = await make(tmp_path / "b.qcow2", MIB, "data_file=b.data,preallocation=metadata", (tmp_path / "b.data",))
    assert stock.content(path, "qcow2") == bytes(MIB)
    stock.fill(path, "qcow2", model)
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2") == model
    stock.check(path)
    assert bytes(64) not in (tmp_path / "b.data").read_bytes()


async def test_an_internal_snapshot(tmp_path: Path) -> None:
    stock, rng = Stock(tmp_path), random.Random(8)
    path = await make(tmp_path / "a.qcow2", MIB, "extended_l2=on")
    first = bytearray(rng.randbytes(MIB))
    stock.fill(path, "qcow2", first)
    images.run("qemu-img", "snapshot", "-c", "first", *stock.secret, "--image-opts", stock.options(path, "qcow2"))
    model = bytearray(first)
    await scribble(path, model, rng)
    assert stock.content(path, "qcow2") == model
    stock.check(path)
    node = await open_image(spec(path, snapshot="first"))
    assert await node.read(0, MIB) == first
    await node.close()


async def test_nothing_of_the_guest_is_in_the_file(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.qcow2", 4 * MIB, "cluster_size=4k")
    node = await open_image(spec(path))
    for offset in range(0, 4 * MIB, 7777):
        await node.write(offset, b"secret guest data")
    await node.zero(0, MIB)
    await node.close()
    assert b"secret guest" not in path.read_bytes()


async def test_the_luks_header_is_no_place_for_data(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.qcow2", MIB)
    data = bytearray(path.read_bytes())
    header = Header.parse(data, "", len(data))
    assert header.luks_area is not None
    node = await open_image(spec(path))
    await node.write(0, b"x")
    await node.close()
    data = bytearray(path.read_bytes())
    l2 = int.from_bytes(data[header.l1_offset : header.l1_offset + 8], "big") & layout.OFFSET_MASK
    data[l2 : l2 + 8] = (header.luks_area[0] | layout.COPIED).to_bytes(8, "big")
    path.write_bytes(data)
    node = await open_image(spec(path))
    with pytest.raises(RequestError, match="metadata"):
        await node.write(0, b"y" * 512)
    await node.close()
    layer = await open_layer(str(path), "qcow2")
    assert (await layer.check()).corruptions > 0
    await layer.close()


@pytest.mark.parametrize(
    ("extension", "kind", "field"),
    [
        (None, CorruptImageError, "crypt_method"),
        (b"", CorruptImageError, "length of the LUKS header extension"),
        (bytes(24), CorruptImageError, "length of the LUKS header extension"),
        ((0, 4096), CorruptImageError, "LUKS header offset"),
        ((512, 4096), CorruptImageError, "LUKS header offset"),
        ((1 << 62, 4096), CorruptImageError, "LUKS header offset"),
        ((65536, 0), CorruptImageError, "LUKS header length"),
        ((65536, (1 << 64) - 1), CorruptImageError, "LUKS header length"),
        ((65536, 591), CorruptImageError, "LUKS header length"),
        ((65536, 4096), CorruptImageError, "LUKS magic"),
    ],
)
async def test_bad_places_of_the_header_are_named(
    tmp_path: Path, extension: Any, kind: type[ImageError], field: str
) -> None:
    path = await make(tmp_path / "a.qcow2", MIB)
    data = bytearray(path.read_bytes())
    header = Header.parse(data, "", len(data))
    if isinstance(extension, tuple):
        extension = layout.LUKS_EXTENSION.build(dict(zip(("offset", "length"), extension, strict=True)))
    others = tuple(item for item in header.extensions if item[0] != layout.EXTENSION_LUKS)
    added = () if extension is None else ((layout.EXTENSION_LUKS, extension),)
    changed = replace(header, extensions=(*added, *others)).build()
    data[: len(changed)] = changed
    path.write_bytes(data)
    for attempt in (open_image(spec(path)), open_layer(str(path), "qcow2")):
        with pytest.raises(kind) as caught:
            await attempt
        assert caught.value.field == field


async def test_methods_that_are_none(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.qcow2", MIB)
    for method, kind in ((3, UnsupportedImageError), (0, CorruptImageError), (1, CorruptImageError)):
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), method.to_bytes(4, "big"), 32)
        with pytest.raises(kind) as caught:
            await open_image(spec(path))
        assert (caught.value.field, caught.value.value) == ("crypt_method", method)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("encrypt.format=aes", "insecure"),
        ("encryption=on", "insecure"),
        ("encrypt.cipher-alg=aes-128", "encrypt.format=luks"),
        ("encrypt.format=none", "encrypt.format=luks"),
        ("encrypt.format=luks,encrypt.cipher-alg=des", "encrypt.cipher-alg=des"),
        ("encrypt.format=luks,compat=0.10,preallocation=metadata", "compat=1.1"),
        ("encrypt.format=luks,data_file=x,data_file_raw=on", "exclude each other"),
    ],
)
def test_bad_options(options: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        plan_image(MIB, options_of(options))
    assert parse_options({"encryption": "off"}).encryption is None


async def test_a_secret_and_encryption_go_together(tmp_path: Path) -> None:
    storage = await FileStorage.open(str(tmp_path / "a"), create=True)
    with pytest.raises(ConfigError, match="not to be encrypted"):
        await Qcow2Driver.create(storage, MIB, {}, secret=SECRET)
    with pytest.raises(ConfigError, match="needs a secret"):
        await Qcow2Driver.create(storage, MIB, options_of(QUICK))
    assert storage.size == 0
    await storage.close()
