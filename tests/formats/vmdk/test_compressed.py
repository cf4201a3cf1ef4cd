import random
import zlib
from pathlib import Path

import pytest

from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.vmdk.compressed import inflate_grain
from nbdserve.units import KIB, MIB
from tests.formats.vmdk.files import GRAIN, content, driver_of, node_of, patch, qemu_io, stock
from tests.support.images import check, convert, needs_qemu

SIZE = 40 * MIB + 512


def test_a_grain_is_inflated_within_limits() -> None:
    data = random.Random(1).randbytes(1000)
    stored = zlib.compress(data)
    assert inflate_grain(stored, 1000, 1000) == data
    assert inflate_grain(stored + b"junk", 2000, 1000) == data
    for bad, size, needed in (
        (stored, 999, 999),
        (stored, 2000, 1001),
        (stored[:-1], 1000, 1000),
        (b"\0" + stored, 1000, 1000),
        (b"", 1000, 1000),
    ):
        with pytest.raises(RequestError, match="compressed grain"):
            inflate_grain(bad, size, needed)


@needs_qemu
async def test_what_qemu_converts_is_read(tmp_path: Path) -> None:
    rng = random.Random(2)
    raw = bytearray(SIZE)
    for _ in range(30):
        at = rng.randrange(SIZE // 512) * 512
        piece = rng.randbytes(rng.choice((512, 4096, 100000)))[: SIZE - at]
        raw[at : at + len(piece)] = piece
    raw[-512:] = b"e" * 512
    (tmp_path / "raw").write_bytes(raw)
    convert(tmp_path / "raw", "raw", tmp_path / "a.vmdk", "vmdk", "-o", "subformat=streamOptimized")
    node = await node_of(tmp_path / "a.vmdk", read_only=True)
    assert node.size == SIZE
    assert await node.read(0, SIZE) == raw
    for _ in range(50):
        at, length = rng.randrange(SIZE), rng.randrange(1, 200000)
        assert await node.read(at, min(length, SIZE - at)) == raw[at : at + length]
    await node.close()


@needs_qemu
async def test_grains_are_added_once_each_and_qemu_reads_them(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", SIZE, "subformat=streamOptimized")
    driver = await driver_of(path, sequential=True)
    cid = driver.descriptor.cid
    rng = random.Random(3)
    expected = bytearray(SIZE)
    grains = {0: rng.randbytes(GRAIN), 3 * GRAIN: b"a" * GRAIN, 33 * MIB: b"b" * GRAIN, 40 * MIB: b"c" * 512}
    for offset, data in grains.items():
        await driver.write_compressed(offset, data)
        expected[offset : offset + len(data)] = data
    for offset, data in ((0, b"x" * GRAIN), (64, b"x" * GRAIN), (GRAIN, b"x" * 512), (40 * MIB, b"x" * GRAIN)):
        with pytest.raises(RequestError):
            await driver.write_compressed(offset, data)
    with pytest.raises(RequestError):
        driver.lookup_writable(0, 512)
    with pytest.raises(RequestError):
        driver.zero(0, GRAIN, unmap=True)
    start, data = await driver.read_compressed(3 * GRAIN + 5)
    assert (start, data) == (3 * GRAIN, b"a" * GRAIN)
    await driver.close()
    assert content(path) == expected
    assert driver.descriptor.cid != cid
    check(path, "vmdk")
    node = await node_of(path, read_only=True)
    assert await node.read(0, SIZE) == expected
    result = await node.top.check()
    assert (result.corruptions, result.compressed_clusters) == (0, 4)
    await node.close()
    qemu_io(path, f"write -P 1 {10 * MIB} 64k", f"read -P 98 {33 * MIB} 64k")


@needs_qemu
async def test_a_stream_is_not_opened_for_ordinary_writing(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB, "subformat=streamOptimized")
    before = path.read_bytes()
    with pytest.raises(ImageError, match="stream-optimized"):
        await node_of(path)
    assert path.read_bytes() == before
    driver = await driver_of(stock(tmp_path / "b.vmdk", MIB))
    with pytest.raises(RequestError):
        await driver.write_compressed(0, bytes(GRAIN))
    await driver.close()


@needs_qemu
@pytest.mark.parametrize("size", [0, 128 * KIB + 1, 0xFFFFFFFF])
async def test_a_bad_marker_is_an_error(tmp_path: Path, size: int) -> None:
    path = stock(tmp_path / "a.vmdk", MIB, "subformat=streamOptimized")
    qemu_io(path, "write 0 64k")
    patch(path, 64 * KIB + 8, size.to_bytes(4, "little"))
    node = await node_of(path, read_only=True)
    with pytest.raises(RequestError, match="grain marker"):
        await node.read(0, 512)
    await node.close()
