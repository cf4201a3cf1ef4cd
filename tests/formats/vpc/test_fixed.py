"""Fixed images: the disk, and a footer that nobody touches."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError, ImageError
from nbdserve.extents import DATA, ZERO
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.formats.vpc.fixed import FixedDriver
from tests.formats.vpc.files import content, make, open_driver, qemu_io, same_as_stock, scribble, stock
from tests.support.recording import ByteStorage
from tests.support.vhd_reader import footer_of

SIZE = 10_514_432


@pytest.mark.parametrize("maker", ["ours", "theirs"])
async def test_both_write_both_read(tmp_path: Path, maker: str) -> None:
    path = tmp_path / "a.vhd"
    if maker == "ours":
        await make(path, SIZE, subformat="fixed")
    else:
        stock(path, SIZE, "subformat=fixed")
    footer = path.read_bytes()[-512:]
    model = bytearray(SIZE)
    await scribble(path, model, 1, 60)
    same_as_stock(path, model)
    qemu_io(path, "write -P 17 1000 70000", f"write -P 18 {SIZE - 4096} 4096")
    model[1000:71000] = b"\x11" * 70000
    model[-4096:] = b"\x12" * 4096
    assert await content(path) == model
    await scribble(path, model, 2, 20)
    same_as_stock(path, model)
    assert path.read_bytes()[-512:] == footer
    assert path.stat().st_size == SIZE + 512
    footer_of(path.read_bytes())


async def test_runs_are_the_files_holes(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", SIZE, subformat="fixed")
    qemu_io(path, "write 1M 64k")
    driver = await open_driver(path, read_only=True)
    runs = [run async for run in driver.iter_runs(0, driver.size)]
    kinds = {kind for piece in runs for kind in piece.kind.tolist()}
    assert kinds == {DATA, ZERO}
    assert sum(int(piece.length.sum()) for piece in runs) == driver.size
    assert driver.lookup(5, 10) == driver.lookup_writable(5, 10) == (DATA, 10, 5)
    await driver.close()


async def test_a_footer_of_511_bytes(tmp_path: Path) -> None:
    data = bytearray((await make(tmp_path / "a.vhd", SIZE, subformat="fixed")).read_bytes())
    data[:5] = b"hello"
    driver = await VpcDriver.open(ByteStorage(data[:-1]), {}, read_only=False)
    assert isinstance(driver, FixedDriver)
    assert driver.size == SIZE
    assert bytes(await driver.data.read(0, 5)) == b"hello"
    await driver.close()


async def test_a_file_that_is_too_short(tmp_path: Path) -> None:
    data = (await make(tmp_path / "a.vhd", SIZE, subformat="fixed")).read_bytes()
    with pytest.raises(CorruptImageError, match="virtual size"):
        await VpcDriver.open(ByteStorage(data[512:]), {}, read_only=True)


async def test_there_is_no_layer_below(tmp_path: Path) -> None:
    driver = await open_driver(await make(tmp_path / "a.vhd", SIZE, subformat="fixed"), read_only=True)
    with pytest.raises(ImageError, match="disk type"):
        driver.accept_backing(driver)
    await driver.close()
