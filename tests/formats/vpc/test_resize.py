"""Growing: others see the new size, what is new is zeroes, and no moment is without a right footer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.vpc import layout
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.formats.vpc.layout import Footer
from nbdserve.formats.vpc.resize import resized_footer
from nbdserve.units import MIB
from tests.formats.vpc.files import content, make, open_driver, open_node, qemu_io, run, same_as_stock, scribble, stock
from tests.support.recording import Barrier, Change, Recorder, apply_change
from tests.support.vhd_reader import footer_of, read_plainly

FOOTER = Footer(
    disk_type=layout.DYNAMIC, data_offset=512, current_size=10_514_432, original_size=10_514_432, cylinders=302,
    heads=4, sectors_per_track=17, uuid=bytes(range(16)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("creator", "size", "after"),
    [
        (b"qemu", 20_994_048, b"qemu"),
        (b"qemu", 20 * MIB, b"qem2"),
        (b"win ", 20 * MIB, b"win "),
        (b"vpc ", 20 * MIB, b"qem2"),
    ],
)
def test_footers(creator: bytes, size: int, after: bytes) -> None:
    larger = resized_footer(replace(FOOTER, creator_app=creator), size)
    assert (larger.size, larger.creator_app, larger.uuid) == (size, after, FOOTER.uuid)
    assert larger.original_size == FOOTER.original_size


@pytest.mark.parametrize(("size", "problem"), [(10_514_433, "whole sectors"), (512, "smaller"), (3 << 40, "2040 GiB")])
def test_sizes_that_cannot_be(size: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        resized_footer(FOOTER, size)


@pytest.mark.parametrize("size", [10_514_432, 11 * MIB, 70 * MIB, 600 * MIB])
@pytest.mark.parametrize("kind", ["dynamic", "fixed", "4k", "theirs"])
async def test_grow(tmp_path: Path, kind: str, size: int) -> None:
    path = tmp_path / "a.vhd"
    options = {"block_size": "4k"} if kind == "4k" else {"subformat": kind}
    if kind == "theirs":
        stock(path, 10 * MIB)
    else:
        await make(path, 10 * MIB, **options)
    model = bytearray(10_514_432)
    await scribble(path, model, 1, 12)
    driver = await open_driver(path)
    await driver.resize(size)
    assert driver.size == size
    result = await driver.check()
    assert (result.corruptions, result.leaks) == (0, 0)
    await driver.close()
    model.extend(bytes(size - len(model)))
    if size < 100 * MIB:
        assert await content(path) == model
        await scribble(path, model, 2, 12)
        same_as_stock(path, model)
        qemu_io(path, f"write -P 3 {size - 5000} 5000")
        model[-5000:] = b"\3" * 5000
        assert await content(path) == model
    assert json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path))["virtual-size"] == size
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(-512, 2)
        footer_of(head + file.read())


async def test_what_was_behind_the_end_does_not_appear(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", 3 * MIB, force_size="on")
    qemu_io(path, "write -P 1 2M 1M")
    data = bytearray(path.read_bytes())
    data[-512 - MIB : -512] = b"J" * MIB
    path.write_bytes(data)
    driver = await open_driver(path)
    await driver.resize(8 * MIB)
    await driver.close()
    assert await content(path) == bytes(2 * MIB) + b"\1" * MIB + bytes(5 * MIB)


@pytest.mark.parametrize("options", [{"block_size": "4k"}, {"subformat": "fixed"}])
async def test_at_every_moment_there_is_a_footer(options: dict[str, str]) -> None:
    recorder = Recorder(jitter=0)
    storage = recorder.storage(b"")
    await VpcDriver.create(storage, MIB, {"force_size": "on", **options})
    recorder.initial[0] = bytes(storage.content)
    recorder.log.clear()
    driver = await VpcDriver.open(storage, {}, read_only=False)
    await driver.resize(2 * MIB)
    state, pending, sizes = bytearray(recorder.initial[0]), 0, []
    for entry in recorder.log:
        if isinstance(entry, Barrier):
            pending = 0
        elif isinstance(entry, Change):
            pending += 1
            assert pending == 1
            apply_change(state, entry)
            sizes.append(Footer.parse(state[-512:], "a").size)
            assert Footer.parse(state[-512:], "a").sound
    assert sizes[0] == MIB
    assert sizes[-1] == 2 * MIB


@pytest.mark.parametrize("mended_by", ["repair", "allocation", "resize"])
async def test_cut_short_between_the_footers(tmp_path: Path, mended_by: str) -> None:
    path = await make(tmp_path / "a.vhd", MIB, block_size="64k", force_size="on")
    old = path.read_bytes()[-512:]
    driver = await open_driver(path)
    await driver.resize(2 * MIB)
    await driver.close()
    path.write_bytes(path.read_bytes()[:-512] + old)
    assert json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path))["virtual-size"] == 2 * MIB
    driver = await open_driver(path)
    found = await driver.check()
    assert (found.corruptions, found.leaks, driver.size) == (0, 1, 2 * MIB)
    assert found.messages == ["Leaked: the footer has 1048576 bytes, as before a resize that was cut short"]
    if mended_by == "repair":
        assert (await driver.check(repair_leaks=True)).leaks_fixed == 1
    elif mended_by == "resize":
        await driver.resize(2 * MIB)
    await driver.close()
    if mended_by == "allocation":
        qemu_io(path, "write -P 3 1M 512")
    data = path.read_bytes()
    assert data[-512:] == data[:512] != old
    driver = await open_driver(path, read_only=True)
    assert (await driver.check()).messages == []
    await driver.close()


@pytest.mark.parametrize("change", [(48, 1), (60, 1), (68, 1)])
async def test_other_differences_of_footers_are_errors(tmp_path: Path, change: tuple[int, int]) -> None:
    """A size, a type and an identity that no resize leaves."""
    path = await make(tmp_path / "a.vhd", MIB, block_size="64k", force_size="on")
    data = bytearray(path.read_bytes())
    footer = data[-512:]
    footer[change[0]] += change[1]
    footer[64:68] = layout.checksum(footer, 64).to_bytes(4, "big")
    data[-512:] = footer
    path.write_bytes(data)
    driver = await open_driver(path, read_only=True)
    assert (await driver.check()).messages == ["ERROR footer: differs from the other one"]
    await driver.close()


@pytest.mark.parametrize("block_size", ["4k", "64k", "2M"])
@pytest.mark.parametrize("base_size", [MIB, 2 * MIB, 5 * MIB])
async def test_a_parent_does_not_appear(tmp_path: Path, base_size: int, block_size: str) -> None:
    base = await make(tmp_path / "base.vhd", base_size, subformat="fixed", force_size="on")
    qemu_io(base, f"write -P 9 0 {base_size}")
    old = 2 * MIB - 512
    path = await make(tmp_path / "a.vhd", old, base, block_size=block_size)
    model = bytearray(b"\x09" * min(base_size, old)).ljust(old, b"\0")
    await scribble(path, model, 1, 3)
    for size in (2 * MIB + 3 * 512, 3 * MIB, 8 * MIB):
        node = await open_node(path)
        await node.top.resize(size)
        await node.close()
        model.extend(bytes(size - len(model)))
        assert await content(path) == model
        assert read_plainly(path.read_bytes(), base.read_bytes()) == model
    await scribble(path, model, 2, 6)
    driver = await open_driver(path)
    result = await driver.check()
    assert (result.corruptions, result.leaks) == (0, 0)
    with pytest.raises(ConfigError, match="parent open"):
        await driver.resize(9 * MIB)
    await driver.close()
