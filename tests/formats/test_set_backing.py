"""Naming another backing file: every format says it in its header, and a crash leaves one name or the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import ConfigError, CorruptImageError
from nbdserve.formats.base import BackingReference, FormatDriver
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import EXTENSION_FEATURE_NAMES, feature_name_table
from nbdserve.formats.registry import driver_for
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB
from tests.support import images
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay

SIZE = 256 * KIB
NAMES = ["b.raw", "n" * 300 + ".qcow2", "", "l" * 600, "m" * 601, "short", "x" * 590]
CASES = [
    ("qcow2", {}),
    ("qcow2", {"cluster_size": "4096"}),
    ("qcow2", {"compat": "0.10"}),
    ("qcow2", {"cluster_size": "8192", "data_file": "d"}),
    ("qcow2", {"many features": ""}),
    ("qed", {}),
    ("qed", {"cluster_size": "4096"}),
    ("qcow", {}),
    ("raw-cow", {"raw_file": "d"}),
]
IDS = ["-".join((name, *(value or key for key, value in options.items()))) for name, options in CASES]


def reference(name: str, *, declares: bool = True) -> BackingReference | None:
    """What is to be named; "" is nothing."""
    form = "qcow2" if name.endswith(".qcow2") else "raw"
    return BackingReference(name, form if declares else None) if name else None


def same(driver: FormatDriver, found: BackingReference | None, wanted: BackingReference | None) -> bool:
    """As far as the format has a word for it."""
    if found is None or wanted is None:
        return found is wanted
    shown = {"qed": "raw" if wanted.format == "raw" else None, "qcow": None}.get(driver.name, wanted.format)
    return (found.name, found.format) == (wanted.name, shown)


def _companions(options: dict[str, str]) -> list[ByteStorage]:
    return [ByteStorage(bytearray(SIZE), "d")] if "data_file" in options or "raw_file" in options else []


async def _empty(name: str, options: dict[str, str]) -> bytes:
    storage, files = ByteStorage(bytearray()), _companions(options)
    first = {} if "data_file" in options else {"backing_file": "first", "backing_fmt": "raw"}
    own = {key: value for key, value in options.items() if key != "many features"}
    await driver_for(name).create(storage, SIZE, first | own, companions=files)
    if "many features" in options:  # whose names reach into the second sector, and past it
        header = Header.parse(storage.content, "empty", len(storage.content))
        names = feature_name_table([(1, bit, f"feature number {bit} of an image") for bit in range(20)])
        extensions = [(kind, names if kind == EXTENSION_FEATURE_NAMES else data) for kind, data in header.extensions]
        built = replace(header, extensions=tuple(extensions)).build()
        storage.content[: len(built)] = built
    return bytes(storage.content)


async def _open(name: str, storage: Any, options: dict[str, str], *, read_only: bool) -> FormatDriver:
    more = {"companions": _companions(options)}
    return await driver_for(name).open(storage, more, read_only=read_only)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
async def test_every_name_is_there_when_the_image_is_opened_again(name: str, options: dict[str, str]) -> None:
    storage = ByteStorage(bytearray(await _empty(name, options)))
    driver = await _open(name, storage, options, read_only=False)
    while (allocation := driver.allocate(0, driver.cluster_size)) is None:
        await driver.prepare(0, driver.cluster_size)
    await driver.data.write(allocation.host_offset, b"d" * driver.cluster_size)
    driver.publish(allocation)
    for new in NAMES:
        if "data_file" in options and len(new) > 512:
            continue
        await driver.set_backing(reference(new))
        assert same(driver, driver.backing, reference(new))
        assert driver.info().backing == driver.backing
        reader = await _open(name, ByteStorage(bytearray(storage.content)), options, read_only=True)
        assert same(reader, reader.backing, reference(new)), new
        while (run := reader.lookup(0, 512)) is None:
            await reader.load(0)
        assert run[0] == 0, "what was written before is there"
        result = await reader.check()
        assert not result.corruptions
    await driver.close()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
async def test_a_crash_leaves_the_old_name_or_the_new_one(name: str, options: dict[str, str]) -> None:
    recorder = Recorder(seed=3)
    storage = recorder.storage(await _empty(name, options))
    driver = await _open(name, storage, options, read_only=False)
    features = driver.header.extension(EXTENSION_FEATURE_NAMES) if isinstance(driver, Qcow2Driver) else None
    names = ["first" if "data_file" not in options else ""]
    marks = []
    for new in NAMES:
        if "data_file" in options and len(new) > 512:
            continue
        await driver.set_backing(reference(new))
        names.append(new)
        marks.append(len(recorder.log))
    states = damaged = 0
    for state in Replay(recorder, None, 5).states(400):
        step = sum(mark < state.position for mark in marks)
        try:
            reader = await _open(name, ByteStorage(state.contents[0]), options, read_only=True)
        except CorruptImageError as error:
            assert name == "raw-cow", f"{state}: {error}"
            assert "header_crc32c" in str(error)
            damaged += 1
            continue
        allowed = names[max(0, step - 1) : step + 2]
        assert any(same(reader, reader.backing, reference(new)) for new in allowed), f"{state}: {reader.backing}"
        if isinstance(reader, Qcow2Driver):  # the names of features are all there, or not shown
            assert reader.header.extension(EXTENSION_FEATURE_NAMES) in (features, None), str(state)
        states += 1
    assert states > 50
    await driver.close()


@pytest.mark.parametrize("name", ["qcow2", "qed", "qcow", "raw-cow"])
async def test_a_name_that_is_too_long_changes_nothing(name: str) -> None:
    options = {"raw_file": "d"} if name == "raw-cow" else {}
    content = await _empty(name, options)
    storage = ByteStorage(bytearray(content))
    driver = await _open(name, storage, options, read_only=False)
    with pytest.raises(ConfigError, match=r"name|room"):
        await driver.set_backing(BackingReference("n" * 1024, "raw"))
    assert same(driver, driver.backing, reference("first"))
    await driver.close()
    reader = await _open(name, storage, options, read_only=True)
    assert same(reader, reader.backing, reference("first"))


async def test_clusters_too_small_for_two_names_say_so() -> None:
    storage = ByteStorage(bytearray(await _empty("qcow2", {"cluster_size": "512"})))
    driver = await _open("qcow2", storage, {}, read_only=False)
    await driver.set_backing(reference("n" * 100))
    with pytest.raises(ConfigError, match="512"):
        await driver.set_backing(reference("n" * 500))
    assert driver.backing == reference("n" * 100)
    await driver.close()


@pytest.mark.parametrize(
    ("fmt", "options"), [("qcow2", ""), ("qcow2", "cluster_size=4096"), ("qcow2", "compat=0.10"), ("qed", "")]
)
async def test_stock_sees_the_name_and_takes_the_image(tmp_path: Path, fmt: str, options: str) -> None:
    path = tmp_path / f"top.{fmt}"
    images.create(tmp_path / "b.raw", SIZE, fmt="raw")
    images.create(path, SIZE, fmt=fmt, options=options, backing=("b.raw", "raw"))
    images.qemu_io(path, fmt, ["write -P 5 0 64k"])
    for new in ("m" * 100, "", "n" * 200 + ".qcow2", "b.raw"):
        driver = await driver_for(fmt).open(await FileStorage.open(str(path)), {}, read_only=False)
        await driver.set_backing(reference(new))
        await driver.close()
        found = images.info(path, fmt)
        assert found.get("backing-filename", "") == new
        if new and (fmt == "qcow2" or not new.endswith(".qcow2")):
            assert found["backing-filename-format"] == ("qcow2" if new.endswith(".qcow2") else "raw")
    images.check(path, fmt)
    images.qemu_io(path, fmt, ["read -P 5 0 64k", "read -P 0 64k 64k"])
