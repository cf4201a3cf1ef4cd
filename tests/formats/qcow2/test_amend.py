"""Amended images: what they are for qemu-img, their content in the disk and in snapshots, and every refusal."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2.amend import parse_amendment
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.units import MIB
from tests.formats.qcow2.engine import check, content, create, open_image, qemu_io, read, run, write
from tests.support.images import needs_qemu

pytestmark = needs_qemu


async def _amend(path: Path, **options: str) -> None:
    driver = await open_image(path)
    try:
        await driver.amend(options)
    finally:
        await driver.close()


def _info(path: Path) -> str:
    return run("qemu-img", "info", path)


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("cluster_size", ["512", "64k"])
async def test_down_and_up_again(tmp_path: Path, cluster_size: str, backed: bool) -> None:
    """Zeroes of every kind, in the disk and in a snapshot that shares tables with it."""
    path, more = tmp_path / "a.qcow2", []
    if backed:
        (tmp_path / "base").write_bytes(random.Random(1).randbytes(MIB))
        more = ["-b", "base", "-F", "raw"]
    create(path, 2 * MIB, f"cluster_size={cluster_size}", *more)
    qemu_io(path, "write -P 1 0 700k", "write -z 64k 200k", "write -z -u 512k 100k", "write -z 1M 200k")
    run("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 100k 50k", "write -z 300k 64k", "write -z 1536k 64k")
    run("qemu-img", "snapshot", "-c", "two", path)
    qemu_io(path, "write -P 3 1M 10k", "write -z 0 10k")
    seen = [content(path), content(path, "-l", "one"), content(path, "-l", "two")]
    await _amend(path, compat="0.10")
    assert "compat: 0.10" in _info(path)
    assert not check(path).get("leaks")
    assert [content(path), content(path, "-l", "one"), content(path, "-l", "two")] == seen
    qemu_io(path, "write -P 9 1700k 4k", "read -P 9 1700k 4k")
    await _amend(path, compat="v3", refcount_bits="32", lazy_refcounts="on")
    assert "compat: 1.1" in _info(path)
    assert "lazy refcounts: true" in _info(path)
    assert "refcount bits: 32" in _info(path)
    check(path)
    assert [content(path, "-l", "one"), content(path, "-l", "two")] == seen[1:]
    run("qemu-img", "snapshot", "-a", "one", path)
    check(path)
    assert content(path) == seen[1]
    run("qemu-img", "amend", "-f", "qcow2", "-o", "refcount_bits=16,lazy_refcounts=off", path)
    run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", path)
    check(path)
    assert content(path) == seen[1]


async def test_the_driver_goes_on_with_what_it_has_become(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB, "compat=0.10")
    driver = await open_image(path)
    await driver.amend({"compat": "1.1"})
    assert driver.info().specific["compat"] == "1.1"
    assert driver.zeroes_fast
    await write(driver, 0, b"\x05" * 200_000)
    assert driver.zero(65536, 65536, unmap=False) == 65536
    await driver.amend({"refcount_bits": "1"})
    await write(driver, 300_000, b"\x06" * 1000)
    await driver.amend({"compat": "v2", "refcount_bits": "16"})
    assert await read(driver, 65536, 65536) == bytes(65536)
    assert driver.zero(0, 65536, unmap=False) == 0
    await driver.close()
    check(path)
    expected = bytearray(b"\x05" * 200_000).ljust(MIB, b"\0")
    expected[65536:131072] = bytes(65536)
    expected[300_000:301_000] = b"\x06" * 1000
    assert content(path) == expected


async def test_backing_file_and_data_file_are_a_matter_of_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").write_bytes(b"\x07" * MIB)
    path = create(tmp_path / "a.qcow2", MIB)
    await _amend(path, backing_file="base", backing_fmt="raw")
    assert content(path) == b"\x07" * MIB
    await _amend(path, backing_file="")
    assert content(path) == bytes(MIB)
    external = create(tmp_path / "b.qcow2", MIB, "data_file=one.raw")
    qemu_io(external, "write -P 5 0 1M")
    (tmp_path / "one.raw").rename(tmp_path / "another.raw")
    storage_options = {"data_file": "another.raw"}
    (tmp_path / "one.raw").write_bytes(bytes(MIB))
    await _amend(external, **storage_options)
    assert content(external) == b"\x05" * MIB
    raw = create(tmp_path / "c.qcow2", MIB, "data_file=c.raw,data_file_raw=on")
    await _amend(raw, data_file_raw="on")
    assert "data file raw: true" in _info(raw)
    await _amend(raw, data_file_raw="off")
    assert "data file raw: false" in _info(raw)
    check(raw)


async def test_snapshots_of_version_2_learn_their_size(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB, "compat=0.10")
    qemu_io(path, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "one", path)
    await _amend(path, compat="1.1")
    driver = await open_image(path)
    await driver.resize(2 * MIB)
    assert driver.snapshots[0].disk_size == MIB
    await driver.close()
    check(path)


REFUSALS = [
    ("", {"compat": "0.11"}, "Unknown compatibility level"),
    ("", {"refcount_bits": "17"}, "power of two"),
    ("", {"lazy_refcounts": "maybe"}, "expects 'on' or 'off'"),
    ("", {"cluster_size": "4k"}, "only supported for image creation"),
    ("", {"encrypt.state": "inactive"}, "Invalid parameter 'encrypt.state'"),
    ("", {"foo": "1"}, "Invalid parameter 'foo'"),
    ("", {"backing_file": "x"}, "never guessed"),
    ("", {"backing_fmt": "raw"}, "needs backing_file"),
    ("", {"data_file": "x"}, "data-file can only be set"),
    ("", {"data_file_raw": "on"}, "cannot be set on existing"),
    ("refcount_bits=32", {"compat": "0.10"}, "requires refcount_bits=16"),
    ("", {"compat": "0.10", "refcount_bits": "8"}, "Refcount widths other than 16"),
    ("compat=0.10", {"refcount_bits": "8"}, "Refcount widths other than 16"),
    ("compat=0.10", {"lazy_refcounts": "on"}, "Lazy refcounts only"),
    ("extended_l2=on", {"compat": "0.10"}, "incompatible features 0x10"),
    ("compression_type=zstd", {"compat": "0.10"}, "incompatible features 0x8"),
    ("data_file=d.raw", {"compat": "0.10"}, "with a data file"),
]


@pytest.mark.parametrize(("made", "options", "words"), REFUSALS, ids=lambda value: str(value)[:30])
async def test_refusals_change_nothing(
    tmp_path: Path, made: str, options: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = create(tmp_path / "a.qcow2", MIB, made)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=words):
        await _amend(path, **options)
    assert path.read_bytes() == before


async def test_snapshots_of_another_size_and_bitmaps_prevent_a_downgrade(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "resize", "-q", path, "2M")
    with pytest.raises(ConfigError, match="Internal snapshots prevent"):
        await _amend(path, compat="0.10")
    other = create(tmp_path / "b.qcow2", MIB)
    run("qemu-img", "bitmap", "--add", other, "dirty")
    with pytest.raises(ConfigError, match="bitmaps prevent"):
        await _amend(other, compat="0.10")


def test_every_option_that_is_listed_is_taken() -> None:
    values = {"compat": "1.1", "refcount_bits": "16", "backing_file": "a", "backing_fmt": "raw", "data_file": "d"}
    options = {option.name: values.get(option.name, "off") for option in Qcow2Driver.amend_options}
    assert parse_amendment(options).version == 3
