"""What ``check`` finds, and what is left after a repair."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.formats.vpc.layout import checksum
from nbdserve.storage.file import FileStorage
from tests.formats.vpc.files import content, make, open_driver, open_node, same_as_stock, scribble
from tests.support.recording import ByteStorage
from tests.support.vhd_reader import NONE, blocks_of, footer_of

SIZE = 1 << 20
BLOCK = 65536


async def image(tmp_path: Path) -> tuple[Path, bytearray]:
    """Sixteen blocks, some of them there."""
    path = await make(tmp_path / "a.vhd", SIZE, block_size="64k", force_size="on")
    model = bytearray(SIZE)
    driver = await open_driver(path)
    await driver.close()
    for index in (0, 1, 3, 9):
        await write(path, index * BLOCK + 5000, b"%d" % index * 3000)
        model[index * BLOCK + 5000 : index * BLOCK + 8000] = b"%d" % index * 3000
    return path, model


async def write(path: Path, offset: int, data: bytes) -> None:
    node = await open_node(path)
    await node.write(offset, data)
    await node.close()


async def checked(path: Path, *, leaks: bool = False, errors: bool = False) -> tuple[int, int, int, int, str]:
    """Corruptions, leaks, both fixed, and the messages."""
    storage = await FileStorage.open(str(path), read_only=not (leaks or errors))
    driver = await VpcDriver.open(storage, {"has_backing": True}, read_only=True)
    result = await driver.check(repair_leaks=leaks, repair_errors=errors)
    await storage.close()
    messages = "\n".join(result.messages)
    return result.corruptions, result.leaks, result.corruptions_fixed, result.leaks_fixed, messages


async def test_a_sound_image(tmp_path: Path) -> None:
    path, _ = await image(tmp_path)
    driver = await open_driver(path, read_only=True)
    result = await driver.check()
    assert (result.corruptions, result.leaks, result.messages) == (0, 0, [])
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (16, 4, 0)
    assert result.image_end_offset == path.stat().st_size
    await driver.close()


DAMAGES = {
    "end": ([(-512, b"x" * 512)], 1, "footer: missing"),
    "end checksum": ([(-412, b"x")], 1, "footer: wrong checksum"),
    "begin": ([(0, bytes(512))], 1, "copy of the footer at the beginning: missing"),
    "begin checksum": ([(100, b"x")], 1, "at the beginning: wrong checksum"),
    "both checksums": ([(100, b"x"), (-412, b"x")], 2, "wrong checksum"),
    "header": ([(512 + 60, b"x")], 1, "header: wrong checksum"),
    "lost": ([(1536 + 8, struct.pack(">I", 0x100000))], 1, "table entry 2 = 0x100000: not inside the file"),
    "bad": ([(1536 + 8, struct.pack(">I", NONE - 1))], 1, "not inside the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_found_and_repaired(tmp_path: Path, damage: str) -> None:
    path, model = await image(tmp_path)
    changes, count, message = DAMAGES[damage]
    data = bytearray(path.read_bytes())
    for at, value in changes:
        start = at % len(data)
        data[start : start + len(value)] = value
    path.write_bytes(data)
    found = await checked(path)
    assert (found[0], found[1]) == (count, 0)
    assert message in found[4]
    assert path.read_bytes() == data
    assert (await checked(path, leaks=True))[0] == count
    assert path.read_bytes() == data
    assert (await checked(path, errors=True))[:4] == (0, 0, count, 0)
    assert (await checked(path))[0] == 0
    assert await content(path) == model
    footer_of(path.read_bytes())
    same_as_stock(path, model)


async def test_blocks_in_wrong_places_are_moved(tmp_path: Path) -> None:
    path, model = await image(tmp_path)
    data = bytearray(path.read_bytes())
    _, table, _ = blocks_of(bytes(data))
    # Block 2 is in the place of block 1, block 4 halfway in that of block 3, block 5 in the table.
    for index, place in ((2, table[1]), (4, table[3] + 9), (5, 3)):
        struct.pack_into(">I", data, 1536 + 4 * index, place)
        start = place * 512 + 512
        model[index * BLOCK : (index + 1) * BLOCK] = data[start : start + BLOCK]
    path.write_bytes(data)
    found = await checked(path)
    assert found[0] == 3
    for text in ("entry 2", "in the place of block 1", "entry 4", "in the place of block 3", "entry 5", "in the table"):
        assert text in found[4]
    # What block 5 shows is the table itself, which the repair changes behind it.
    assert (await checked(path, errors=True))[:4] == (0, 0, 3, 0)
    seen = await content(path)
    assert seen[: 5 * BLOCK] == model[: 5 * BLOCK]
    assert seen[6 * BLOCK :] == model[6 * BLOCK :]
    same_as_stock(path, seen)
    await write(path, 2 * BLOCK, b"2" * 100)
    assert await content(path) == seen[: 2 * BLOCK] + b"2" * 100 + seen[2 * BLOCK + 100 :]


async def test_a_truncated_file(tmp_path: Path) -> None:
    """The last block is cut: what is left of it stays, the rest is zeroes."""
    path, model = await image(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: -512 - BLOCK + 7000])
    found = await checked(path)
    assert found[0] == 2
    assert "not wholly inside" in found[4]
    assert (await checked(path, errors=True))[:4] == (0, 0, 2, 0)
    model[9 * BLOCK + 7000 : 9 * BLOCK + 8000] = bytes(1000)
    assert await content(path) == model
    same_as_stock(path, model)


async def test_space_that_nothing_uses(tmp_path: Path) -> None:
    path, model = await image(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-512] + b"J" * (3 * BLOCK) + data[-512:])
    found = await checked(path)
    assert found[:2] == (0, 2)
    assert "Leaked" in found[4]
    assert (await checked(path, leaks=True))[:4] == (0, 0, 0, 2)
    assert path.read_bytes() == data
    assert await content(path) == model


async def test_a_fixed_image(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", SIZE, subformat="fixed", force_size="on")
    assert (await checked(path))[:2] == (0, 0)
    data = bytearray(path.read_bytes())
    data[-412] ^= 1
    for size in (len(data), len(data) - 1):
        path.write_bytes(data[:size])
        found = await checked(path)
        assert found[:1] == (1,)
        assert "wrong checksum" in found[4]
        assert (await checked(path, errors=True))[:4] == (0, 0, 1, 0)
        assert path.stat().st_size == size


async def test_a_differencing_image(tmp_path: Path) -> None:
    base, model = await image(tmp_path)
    base = base.rename(tmp_path / "base.vhd")
    path = await make(tmp_path / "a.vhd", SIZE, base, block_size="4k")
    await scribble(path, model, 1, 6)
    assert (await checked(path))[:2] == (0, 0)
    data = bytearray(path.read_bytes())
    data[:512] = bytes(512)
    data[512 + 60] ^= 1
    path.write_bytes(data)
    assert (await checked(path, errors=True))[:4] == (0, 0, 2, 0)
    assert await content(path) == model


@pytest.mark.parametrize("field", ["locator", "table"])
async def test_what_the_header_has_outside_the_file(tmp_path: Path, field: str) -> None:
    """A repair makes the header shorter, not the file longer."""
    base, model = await image(tmp_path)
    base = base.rename(tmp_path / "base.vhd")
    path = await make(tmp_path / "a.vhd", SIZE, base, block_size="4k")
    await scribble(path, model, 1, 6)
    data = bytearray(path.read_bytes())
    if field == "locator":
        struct.pack_into(">4sIIIQ", data, 512 + 576, b"W2ru", 512, 100, 0, (1 << 64) - 200)
    else:
        struct.pack_into(">I", data, 512 + 28, 0xFFFF_FFFF)
    data[512 + 36 : 512 + 40] = checksum(data[512:1536], 36).to_bytes(4, "big")
    path.write_bytes(data)
    found = await checked(path)
    assert found[:2] == (1, 0) and "what it points at does not end inside the file" in found[4]
    driver = await open_driver(path, read_only=True)
    assert (await driver.check()).image_end_offset == len(data)
    await driver.close()
    assert (await checked(path, leaks=True, errors=True))[:4] == (0, 0, 1, 0)
    assert path.stat().st_size == len(data)
    assert await content(path) == model


async def test_while_it_is_written(tmp_path: Path) -> None:
    """A repair by the driver that has the image open for writing: it goes on with what is there then."""
    path, model = await image(tmp_path)
    data = bytearray(path.read_bytes())
    data[:512] = bytes(512)
    path.write_bytes(data)
    driver = await open_driver(path)
    await driver.prepare(2 * BLOCK, 512)
    allocation = driver.allocate(2 * BLOCK, 512)
    assert allocation is not None
    await driver.data.write(allocation.host_offset, b"w" * 512)
    driver.publish(allocation)
    result = await driver.check(repair_errors=True)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    await driver.load(2 * BLOCK)
    run = driver.lookup_writable(2 * BLOCK, 512)
    assert run is not None
    await driver.data.write(run[2] + 100, b"v")
    await driver.close()
    model[2 * BLOCK : 2 * BLOCK + 512] = b"w" * 512
    model[2 * BLOCK + 100 : 2 * BLOCK + 101] = b"v"
    assert await content(path) == model
    assert (await checked(path))[:2] == (0, 0)


async def test_a_device_has_no_footer_at_its_end(tmp_path: Path) -> None:
    path, _ = await image(tmp_path)
    storage = ByteStorage(path.read_bytes() + bytes(10 * BLOCK))
    storage.grows_zeroed = False
    driver = await VpcDriver.open(storage, {}, read_only=True)
    result = await driver.check()
    assert (result.corruptions, result.leaks) == (0, 0)
