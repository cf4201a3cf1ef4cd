"""The driver against qemu-img and qemu-io, both ways, over every geometry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from tests.formats.qcow2.engine import (
    agrees,
    change,
    check,
    content,
    create,
    mapping,
    open_image,
    qemu_io,
    random_changes,
    read,
    run,
    write,
)

GEOMETRIES = [
    *(f"cluster_size={512 << bits}" for bits in range(13)),
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    *(f"refcount_bits={1 << order},cluster_size=4k" for order in range(7)),
    "refcount_bits=64,cluster_size=512",
    "refcount_bits=1,cluster_size=512",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on",
    "extended_l2=on,cluster_size=2M",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=metadata,extended_l2=on",
    "preallocation=falloc,cluster_size=4k",
]


def _size(options: str) -> int:
    """An odd size that needs several L2 tables where clusters are small, and a last cluster that is not whole."""
    return (9 << 20) + 512 * 3 if "2M" in options or "cluster_size=1048576" in options else (3 << 20) + 512 * 3


@pytest.mark.parametrize("options", GEOMETRIES)
async def test_reads_what_qemu_wrote(tmp_path: Path, options: str) -> None:
    size = _size(options)
    path = create(tmp_path / "a.qcow2", size, options)
    zeroes = () if "0.10" in options else ("write -z 1M 200k", "write -zu 1536k 64k")
    qemu_io(path, "write -P 1 0 700", "write -P 2 100000 300k", "write -P 3 2M 1M", *zeroes, "discard 2200k 128k")
    expected = content(path)
    driver = await open_image(path, read_only=True)
    assert await read(driver, 0, size) == expected
    for offset, length in ((1, 1), (99_999, 70_000), (size - 700, 700)):
        assert await read(driver, offset, length) == expected[offset : offset + length]
    await agrees(driver)
    await driver.close()


@pytest.mark.parametrize("options", GEOMETRIES)
async def test_qemu_reads_what_we_wrote(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "a.qcow2", _size(options), options)
    model = bytearray(_size(options))
    for session in range(2):
        driver = await open_image(path, discard="unmap" if session else "ignore")
        await random_changes(driver, model, 120, session)
        await agrees(driver)
        assert await read(driver, 0, len(model)) == model
        await driver.close()
        found = check(path)
        assert found.get("leaks", 0) == 0
        assert content(path) == model


@pytest.mark.parametrize("options", ["", "cluster_size=512", "compat=0.10", "extended_l2=on,cluster_size=16k"])
async def test_backing_content_stays_below(tmp_path: Path, options: str) -> None:
    size = 2 << 20
    below = bytes(range(1, 129)) * (size // 128)
    (tmp_path / "base.raw").write_bytes(below)
    path = create(tmp_path / "a.qcow2", size, options, "-b", tmp_path / "base.raw", "-F", "raw")
    model = bytearray(below)
    driver = await open_image(path)
    assert driver.backing is not None and driver.backing.format == "raw"
    await random_changes(driver, model, 150, 5, below)
    assert await read(driver, 0, size, below) == model
    await driver.close()
    check(path)
    assert content(path) == model


@pytest.mark.parametrize("options", ["", "cluster_size=1k", "extended_l2=on,cluster_size=16k", "compat=0.10"])
async def test_snapshots_keep_their_content(tmp_path: Path, options: str) -> None:
    size = (2 << 20) + 1024
    path = create(tmp_path / "a.qcow2", size, options)
    model = bytearray(size)
    saved = {}
    for name in ("one", "two"):
        driver = await open_image(path, discard="unmap")
        await random_changes(driver, model, 100, len(name))
        await driver.close()
        run("qemu-img", "snapshot", "-c", name, path)
        saved[name] = bytes(model)
    driver = await open_image(path, discard="unmap")
    await random_changes(driver, model, 150, 77)
    await driver.close()
    assert check(path).get("leaks", 0) == 0
    assert content(path) == model
    for name, expected in saved.items():
        assert content(path, "-l", f"snapshot.name={name}") == expected
        driver = await open_image(path, snapshot=name)
        assert driver.read_only and driver.size == size
        assert await read(driver, 0, size) == expected
        await agrees(driver)
        await driver.close()
    for name in saved:
        run("qemu-img", "snapshot", "-d", name, path)
    assert check(path).get("leaks", 0) == 0
    assert content(path) == model


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "extended_l2=on,cluster_size=16k"])
async def test_compressed_clusters(tmp_path: Path, kind: str, options: str) -> None:
    raw = tmp_path / "base.raw"
    data = b"".join(bytes([n % 251, n % 7, 3, 4]) * 1024 for n in range(300)) + bytes(100_000)
    raw.write_bytes(data)
    path = tmp_path / "a.qcow2"
    options = f"{options},compression_type={kind}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    model = bytearray(content(path))
    driver = await open_image(path)
    runs = await mapping(driver)
    assert sum(found == COMPRESSED for _, _, found, _ in runs) >= 19
    await agrees(driver)
    assert await read(driver, 0, len(model)) == model
    await random_changes(driver, model, 100, 3)
    assert await read(driver, 0, len(model)) == model
    await driver.close()
    assert check(path).get("leaks", 0) == 0
    assert content(path) == model


@pytest.mark.parametrize("options", ["", ",data_file_raw=on", ",extended_l2=on", ",cluster_size=4k"])
async def test_external_data_file(tmp_path: Path, options: str) -> None:
    size = 3 << 20
    path = create(tmp_path / "a.qcow2", size, f"data_file={tmp_path / 'd.raw'}{options}")
    qemu_io(path, "write -P 7 64k 300k", "write -z 128k 64k")
    model = bytearray(content(path))
    driver = await open_image(path)
    assert await read(driver, 0, size) == model
    await random_changes(driver, model, 150, 9)
    for _, _, kind, host_offset in [r for r in await mapping(driver) if r[2] == DATA]:
        assert kind == DATA and host_offset >= 0
    assert all(start == host for start, _, kind, host in await mapping(driver) if kind == DATA)
    await driver.close()
    check(path)
    assert content(path) == model
    if "raw" in options:
        assert (tmp_path / "d.raw").read_bytes()[:size] == model


async def test_lookup_joins_adjacent_clusters(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    driver = await open_image(path)
    await write(driver, 0, b"x" * (1 << 20))
    found = driver.lookup(1000, 1 << 19)
    assert found is not None and found[:2] == (DATA, 1 << 19)
    found = driver.lookup_writable(1000, 1 << 19)
    assert found is not None and found[:2] == (DATA, 1 << 19)
    assert driver.lookup(1 << 20, 1 << 20) == (UNALLOCATED, 1 << 20, -1)
    await driver.close()


async def test_zero_keeps_or_gives_back_space(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    driver = await open_image(path)
    await write(driver, 0, b"x" * (1 << 18))
    before = driver.lookup(0, 1 << 16)
    assert before is not None
    await change(driver, "zero", 0, 1 << 16, unmap=False)
    assert driver.lookup(0, 1 << 16) == (ZERO, 1 << 16, before[2])
    await change(driver, "zero", 1 << 16, 1 << 16, unmap=True)
    assert driver.lookup(1 << 16, 1 << 16) == (ZERO, 1 << 16, -1)
    await write(driver, 0, b"y")
    assert driver.lookup(0, 1 << 16) == before
    await driver.close()
    check(path)


async def test_freed_clusters_are_reused_only_after_a_flush(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    driver = await open_image(path)
    await write(driver, 0, b"x" * (1 << 20))
    await driver.flush()
    size = driver.storage.size
    for _ in range(2):
        await change(driver, "discard", 0, 1 << 20)
        await write(driver, 0, b"y" * (1 << 20))
    assert driver.storage.size == size + (2 << 20)
    await driver.flush()
    await driver.flush()
    await change(driver, "discard", 0, 1 << 20)
    await write(driver, 0, b"z" * (1 << 20))
    assert driver.storage.size == size + (2 << 20)
    await driver.close()
    assert check(path).get("leaks", 0) == 0


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=512,refcount_bits=64"])
async def test_refcount_table_grows(tmp_path: Path, options: str) -> None:
    """64 blocks fit into one cluster of 512 bytes: 64 * 256 (or 64) clusters, 8 MiB (2 MiB)."""
    path = create(tmp_path / "a.qcow2", "32M", options)
    driver = await open_image(path)
    data = bytes(range(256)) * 4096
    for offset in range(0, 20 << 20, 1 << 20):
        await write(driver, offset, data)
        if offset == 9 << 20:
            await driver.flush()
    await driver.close()
    assert check(path).get("leaks", 0) == 0
    assert content(path) == data * 20 + bytes(12 << 20)


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on,refcount_bits=8", "lazy_refcounts=on"])
async def test_info_has_the_keys_of_qemu_img(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "a.qcow2", "8M", options)
    run("qemu-img", "snapshot", "-c", "first", path)
    theirs = json.loads(run("qemu-img", "info", "--output=json", path))
    driver = await open_image(path, read_only=True)
    info = driver.info()
    assert info.specific == theirs["format-specific"]["data"]
    (snapshot,) = info.snapshots
    shown = theirs["snapshots"][0]
    assert (snapshot.id, snapshot.name, snapshot.date_sec) == (shown["id"], shown["name"], shown["date-sec"])
    assert (info.virtual_size, info.cluster_size) == (theirs["virtual-size"], theirs["cluster-size"])
    await driver.close()
