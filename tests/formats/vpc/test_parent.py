"""Another parent, or none, as independent readers see it, and where the header is then."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.base import BackingReference
from nbdserve.formats.vpc.create import HEADER_OFFSET
from tests.formats.vpc.files import content, make, open_driver, qemu_io, same_as_stock, scribble
from tests.formats.vpc.test_differencing import BYTE, by_libvhdi
from tests.support.vhd_reader import footer_of, read_plainly

SIZE = 4 << 20


async def _name(path: Path, parent: Path | None) -> None:
    driver = await open_driver(path)
    below = None if parent is None else await open_driver(parent, read_only=True)
    await driver.set_backing(None if parent is None else BackingReference(parent.name, "vpc"), below)
    await driver.close()
    if below is not None:
        await below.close()


async def _header_at(path: Path) -> int:
    driver = await open_driver(path, read_only=True)
    await driver.close()
    return driver.footer.data_offset


@pytest.mark.parametrize("blocks", ["2M", "4096"])
async def test_independent_readers_see_the_new_parent(tmp_path: Path, blocks: str) -> None:
    first, second, top = (tmp_path / name for name in ("first.vhd", "the second one.vhd", "top.vhd"))
    models = {}
    for number, path in enumerate((first, second)):
        await make(path, SIZE, force_size="on")
        models[path] = bytearray(SIZE)
        await scribble(path, models[path], number, 10, BYTE)
    await make(top, SIZE, first, block_size=blocks)
    size = top.stat().st_size
    own = bytearray(models[first])
    await scribble(top, own, 5, 6, BYTE)
    size = top.stat().st_size
    places = []
    for parent in (second, first, second, first):
        await _name(top, parent)
        seen = await content(top)
        assert read_plainly(top.read_bytes(), parent.read_bytes()) == seen
        assert by_libvhdi(top, parent) == seen
        places.append(await _header_at(top))
    assert seen == own
    assert places[1] == places[3] == HEADER_OFFSET
    assert places[0] != HEADER_OFFSET
    assert top.stat().st_size <= size + 4 * 2560, "each leaves a header or a name behind"


async def test_stock_tools_take_an_image_that_stands_alone(tmp_path: Path) -> None:
    parent = await make(tmp_path / "p.vhd", SIZE, force_size="on")
    top = await make(tmp_path / "t.vhd", SIZE, parent, block_size="65536")
    model = bytearray(SIZE)
    await scribble(top, model, 1, 6)
    await _name(top, parent)
    assert await _header_at(top) != HEADER_OFFSET
    await _name(top, None)
    assert await _header_at(top) == HEADER_OFFSET, "stock tools put blocks behind the last one"
    assert footer_of(top.read_bytes())["type"] == 3
    parent.unlink()
    same_as_stock(top, model)
    for at in range(0, SIZE, 65536):
        qemu_io(top, f"write -P 9 {at} 512")
        model[at : at + 512] = b"\x09" * 512
    same_as_stock(top, model)
    assert await content(top) == model
    await scribble(top, model, 2, 20)
    same_as_stock(top, model)


async def test_a_dynamic_image_with_a_parent_shows_what_it_had(tmp_path: Path) -> None:
    parent = await make(tmp_path / "p.vhd", SIZE, force_size="on")
    await scribble(parent, bytearray(SIZE), 1, 30)
    top = await make(tmp_path / "t.vhd", SIZE, force_size="on", block_size="4096")
    model = bytearray(SIZE)
    for at in range(0, SIZE, 4096):
        qemu_io(top, f"write -P 7 {at} 512") if at < 40960 else None
        model[at : at + 512] = b"\x07" * 512 if at < 40960 else bytes(512)
    await _name(top, parent)
    model[40960:] = (await content(parent))[40960:]
    assert await content(top) == model
    assert read_plainly(top.read_bytes(), parent.read_bytes()) == model


async def test_a_name_that_cannot_be_stored(tmp_path: Path) -> None:
    parent = await make(tmp_path / "p.vhd", SIZE)
    top = await make(tmp_path / "t.vhd", SIZE, parent)
    before = top.read_bytes()
    driver, below = await open_driver(top), await open_driver(parent, read_only=True)
    with pytest.raises(ConfigError, match="cannot be stored"):
        await driver.set_backing(BackingReference("n" * 256, "vpc"), below)
    with pytest.raises(ConfigError, match="has to be opened"):
        await driver.set_backing(BackingReference("p.vhd", "vpc"))
    await driver.close()
    await below.close()
    assert top.read_bytes() == before
