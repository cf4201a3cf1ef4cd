"""What the check of VDI images finds, and what it mends."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nbdserve.formats.base import CheckResult
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.driver import VdiDriver
from nbdserve.formats.vdi.layout import FREE
from nbdserve.units import MIB
from tests.formats import flat
from tests.support import images

pytestmark = images.needs_qemu
SIZE = 6 * MIB


async def _image(path: Path, entries: list[int], count: int, blocks: int) -> Path:
    """``blocks`` blocks of data, each full of its number plus 1."""
    await flat.make(path, SIZE, "vdi")
    with path.open("r+b") as file:
        file.seek(layout.BLOCKS_ALLOCATED_AT)
        file.write(struct.pack("<I", count))
        file.seek(512)
        file.write(struct.pack("<6I", *entries))
        for number in range(blocks):
            file.seek((1 + number) * MIB)
            file.write(bytes([number + 1]) * MIB)
    return path


async def _check(path: Path, **how: bool) -> CheckResult:
    result: CheckResult = await flat.check_alone(VdiDriver, path, **how)
    return result


async def test_clean(tmp_path: Path) -> None:
    path = await _image(tmp_path / "a", [FREE, 1, 0, 2, FREE, 3], 4, 4)
    result = await _check(path, repair_leaks=True, repair_errors=True)
    assert (result.corruptions, result.leaks, result.check_errors, result.messages) == (0, 0, 0, [])
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (6, 4, 2)
    assert result.image_end_offset == 5 * MIB
    images.check(path, "vdi")


@pytest.mark.parametrize(
    ("entries", "count", "blocks", "corruptions", "leaks"),
    [
        pytest.param([0, 1, FREE, FREE, FREE, FREE], 3, 3, 0, 1, id="count too high"),
        pytest.param([0, 2, FREE, FREE, FREE, FREE], 3, 3, 0, 1, id="hole, the count right"),
        pytest.param([0, 2, FREE, FREE, FREE, FREE], 2, 3, 1, 1, id="hole, the count of entries"),
        pytest.param([0, 1, FREE, FREE, FREE, FREE], 0, 2, 1, 0, id="count too low"),
        pytest.param([1, 1, 0, 1, FREE, FREE], 2, 2, 2, 0, id="shared"),
        pytest.param([0, 9, FREE, 0xFFFFFFF0, FREE, FREE], 1, 1, 2, 0, id="outside"),
        pytest.param([5, 5, 9, 3, 3, 1], 3, 6, 4, 3, id="everything"),
    ],
)
async def test_faults_are_found_and_mended(
    tmp_path: Path, entries: list[int], count: int, blocks: int, corruptions: int, leaks: int
) -> None:
    path = await _image(tmp_path / "a", entries, count, blocks)
    before = path.read_bytes()
    result = await _check(path)
    assert (result.corruptions, result.leaks) == (corruptions, leaks)
    assert result.messages
    assert path.read_bytes() == before
    fixed = await _check(path, repair_leaks=True, repair_errors=True)
    assert (fixed.corruptions, fixed.leaks) == (0, 0)
    assert (fixed.corruptions_fixed, fixed.leaks_fixed) == (corruptions, leaks)
    images.check(path, "vdi")
    model = b"".join(bytes([e + 1 if e < blocks else 0]) * MIB for e in entries)
    assert flat.content(path, "vdi") == model
    images.qemu_io(path, "vdi", ["write -P 0x77 2M 1M", "write -P 0x66 5M 1M"])
    model = model[: 2 * MIB] + b"\x77" * MIB + model[3 * MIB : 5 * MIB] + b"\x66" * MIB
    assert flat.content(path, "vdi") == model
    images.check(path, "vdi")


async def test_leaks_alone_are_mended_only_without_errors(tmp_path: Path) -> None:
    path = await _image(tmp_path / "a", [0, 2, FREE, FREE, FREE, FREE], 2, 3)
    before = path.read_bytes()
    result = await _check(path, repair_leaks=True)
    assert (result.corruptions, result.leaks, result.leaks_fixed) == (1, 1, 0)
    assert path.read_bytes() == before
    path = await _image(tmp_path / "b", [0, 2, FREE, FREE, FREE, FREE], 3, 3)
    result = await _check(path, repair_leaks=True)
    assert (result.leaks, result.leaks_fixed) == (0, 1)
    assert path.stat().st_size == 3 * MIB


async def test_stock_may_use_what_a_crash_left(tmp_path: Path) -> None:
    """The count is too high, which its check calls an error; what it writes then is nowhere over data."""
    path = await _image(tmp_path / "a", [1, 0, FREE, FREE, FREE, FREE], 4, 2)
    assert (await _check(path)).corruptions == 0
    with pytest.raises(images.ToolError, match="exit code 2"):
        images.check(path, "vdi")
    images.qemu_io(path, "vdi", [f"write -P {0x60 + at} {at}M 1M" for at in range(2, 6)])
    assert flat.content(path, "vdi") == b"".join(bytes([b]) * MIB for b in (2, 1, 0x62, 0x63, 0x64, 0x65))
    result = await _check(path, repair_leaks=True)
    assert result.leaks_fixed == 2
    images.check(path, "vdi")
    assert flat.content(path, "vdi") == b"".join(bytes([b]) * MIB for b in (2, 1, 0x62, 0x63, 0x64, 0x65))


async def test_an_open_image_is_checked_as_it_is_in_memory(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a", SIZE, "vdi")
    driver = await flat.open_with(VdiDriver, path)
    await flat.write(driver, MIB, b"x")
    result = await driver.check()
    assert (result.allocated_clusters, result.corruptions, result.leaks) == (1, 0, 0)
    await driver.close()
