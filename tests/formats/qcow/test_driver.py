"""qcow, version 1: compressed clusters, backing files whose format only the user knows, and QEMU beside us."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.config.image_opts import image_from_filename
from nbdserve.errors import ConfigError, ImageError, RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED
from nbdserve.formats.qcow.driver import QcowDriver, read_header
from nbdserve.formats.two_level.entries import FLAG
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.support import images
from tests.support.recording import ByteStorage

SIZE = 3 * MIB
CLUSTER = 4 * KIB


async def made(size: int = SIZE, **options: str) -> ByteStorage:
    storage = ByteStorage(path="x.qcow")
    await QcowDriver.create(storage, size, options)
    return storage


async def opened(storage: ByteStorage, *, read_only: bool = False) -> Node:
    return Node([await QcowDriver.open(storage, {}, read_only=read_only)], unmap=True)


async def with_compressed(*, cluster: bytes, stored: bytes | None = None, length: int | None = None) -> ByteStorage:
    """An image whose second cluster is compressed; behind it is other data."""
    storage = await made()
    node = await opened(storage)
    await node.write(0, b"\1" * CLUSTER)
    driver = node.top
    assert isinstance(driver, QcowDriver)
    l2_offset = driver.slice_offset(0)
    await node.close()
    if stored is None:
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        stored = packer.compress(cluster) + packer.flush()
    at = storage.size + 5
    storage.content += bytes(5) + stored + b"\xee" * 100
    entry = FLAG | (len(stored) if length is None else length) << 63 - 12 | at
    storage.content[l2_offset + 8 : l2_offset + 16] = entry.to_bytes(8, "big")
    return storage


async def test_a_compressed_cluster_is_read_and_replaced() -> None:
    cluster = random.Random(1).randbytes(100) + bytes(CLUSTER - 100)
    storage = await with_compressed(cluster=cluster)
    node = await opened(storage)
    assert await node.read(0, 3 * CLUSTER) == b"\1" * CLUSTER + cluster + bytes(CLUSTER)
    run = node.top.lookup(CLUSTER + 100, 3 * CLUSTER)
    assert run is not None
    assert run[:2] == (COMPRESSED, CLUSTER - 100)
    assert storage.content[run[2] - 5 : run[2]] == bytes(5)
    [piece] = [piece async for piece in node.top.iter_runs(0, 3 * CLUSTER)]
    assert piece.kind.tolist() == [DATA, COMPRESSED, UNALLOCATED]
    assert piece.host_offset[1] == run[2]
    await node.write(CLUSTER + 50, b"new")
    expected = cluster[:50] + b"new" + cluster[53:]
    assert await node.read(CLUSTER, CLUSTER) == expected
    assert (await node.top.check()).compressed_clusters == 0
    await node.close()
    assert await (await opened(storage)).read(CLUSTER, CLUSTER) == expected


async def test_zeroing_a_compressed_cluster_needs_no_data() -> None:
    storage = await with_compressed(cluster=b"\7" * CLUSTER)
    node = await opened(storage)
    await node.zero(CLUSTER, CLUSTER)
    assert node.top.lookup(CLUSTER, CLUSTER) == (UNALLOCATED, CLUSTER, -1)
    await node.close()
    assert await (await opened(storage)).read(0, 2 * CLUSTER) == b"\1" * CLUSTER + bytes(CLUSTER)


@pytest.mark.parametrize(
    "stored", [b"", b"\xff" * 40, zlib.compress(bytes(CLUSTER))[2:-4][:8], zlib.compress(bytes(5000), wbits=-12)]
)
async def test_what_is_no_compressed_cluster_is_an_error(stored: bytes) -> None:
    node = await opened(await with_compressed(cluster=b"", stored=stored))
    with pytest.raises(RequestError):
        await node.read(CLUSTER, 1)
    assert await node.read(0, CLUSTER) == b"\1" * CLUSTER
    await node.close()


async def test_a_compressed_cluster_that_reaches_past_the_end_of_the_file() -> None:
    node = await opened(await with_compressed(cluster=bytes(CLUSTER), length=4000))
    with pytest.raises(RequestError, match="invalid"):
        await node.read(CLUSTER, 1)


async def test_zeroes_over_a_backing_file_are_written() -> None:
    storage = await made(backing_file="base", backing_fmt="raw")
    node = await opened(storage)
    assert not node.top.zeroes_fast
    assert node.top.cluster_size == 512
    assert node.top.zero(0, 512, unmap=True) == 0


async def test_without_one_they_are_not() -> None:
    storage = await made()
    node = await opened(storage)
    assert node.top.zeroes_fast
    await node.write(CLUSTER, b"x" * CLUSTER)
    await node.zero(0, SIZE)
    assert node.top.lookup(0, CLUSTER) == (UNALLOCATED, CLUSTER, -1)
    assert await node.read(0, SIZE) == bytes(SIZE)
    await node.close()
    assert storage.size <= 4 * CLUSTER


async def test_an_encrypted_image_needs_a_secret() -> None:
    storage = await made()
    storage.content[36:40] = (1).to_bytes(4, "big")
    with pytest.raises(ImageError, match="no secret is given"):
        await opened(storage, read_only=True)


async def test_a_new_table_is_inside_the_file_even_when_the_disk_is_not_closed() -> None:
    """QEMU allocates at the end of the file, which must therefore be behind all that is in use."""
    storage = await made()
    node = await opened(storage)
    await node.write(0, b"x")
    await node.flush()
    driver = node.top
    assert isinstance(driver, QcowDriver)
    assert storage.size >= driver.slice_offset(0) + driver.geometry.table_bytes


@images.needs_qemu
@pytest.mark.parametrize("compressed", [False, True])
async def test_in_turns_with_qemu_io(tmp_path: Path, compressed: bool) -> None:
    size = SIZE + 512
    source, path = tmp_path / "source", tmp_path / "x.qcow"
    rng = random.Random(compressed)
    content = bytearray(rng.randbytes(64) * (size // 64))
    content[MIB : 2 * MIB] = bytes(MIB)
    source.write_bytes(content)
    # With -c qemu-img is known to end with 1 and no message although the image is right.
    more = ["-c"] if compressed else []
    images.run("qemu-img", "convert", "-f", "raw", "-O", "qcow", *more, source, path, codes=(0, 1))
    for _ in range(3):
        storage = ByteStorage(path.read_bytes())
        node = await opened(storage)
        assert await node.read(0, size) == content
        for _ in range(30):
            offset = rng.randrange(size)
            data = rng.randbytes(min(size - offset, rng.choice((1, 4096, 100_000))))
            await node.write(offset, data)
            content[offset : offset + len(data)] = data
        assert (await node.top.check()).corruptions == 0
        await node.close()
        path.write_bytes(storage.content)
        assert images.raw_content(path, "qcow", tmp_path) == content
        images.qemu_io(path, "qcow", images.random_qemu_io(rng, size, 15, content))


# --- the backing file's format -------------------------------------------------------------------------------------


async def on_disk(folder: Path, fmt: str = "qcow") -> Path:
    """An image of ``fmt`` on a qcow2 base that reads as 0x62."""
    base, path = folder / "base.img", folder / f"x.{fmt}"
    images.create(base, MIB, fmt="qcow2")
    images.qemu_io(base, "qcow2", ["write -P 0x62 0 1M"])
    images.create(path, None, fmt=fmt, backing=("base.img", "qcow2"))
    return path


@images.needs_qemu
@pytest.mark.parametrize("fmt", ["qcow", "qed"])
async def test_a_format_that_no_header_declares_is_not_guessed(tmp_path: Path, fmt: str) -> None:
    path = await on_disk(tmp_path, fmt)
    with pytest.raises(ImageError, match="never guessed") as refusal:
        await open_image(ImageSpec(str(path), fmt))
    _, _, told = str(refusal.value).rstrip(")").partition("json:")
    spec = image_from_filename("json:" + told.replace("FORMAT", "qcow2"), ImageSpec("", read_only=True))
    node = await open_image(spec)
    assert await node.read(0, 512) == b"\x62" * 512
    await node.close()


@images.needs_qemu
@pytest.mark.parametrize("fmt", ["qcow", "qed"])
async def test_the_user_gives_the_format_of_the_file_the_header_names(tmp_path: Path, fmt: str) -> None:
    path = await on_disk(tmp_path, fmt)
    node = await open_image(ImageSpec(str(path), fmt, backing=ImageSpec("", "qcow2")))
    assert await node.read(MIB - 512, 512) == b"\x62" * 512
    await node.write(512, b"over")
    await node.close()
    alone = await open_image(ImageSpec(str(path), fmt, backing=None, read_only=True))
    assert await alone.read(MIB - 512, 512) == bytes(512)
    await alone.close()
    assert images.raw_content(path, fmt, tmp_path)[508:520] == b"\x62" * 4 + b"over" + b"\x62" * 4


@images.needs_qemu
async def test_the_format_of_a_file_that_no_header_names(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow"
    images.create(path, MIB, fmt="qcow")
    with pytest.raises(ImageError, match="names none"):
        await open_image(ImageSpec(str(path), "qcow", backing=ImageSpec("", "raw")))


@images.needs_qemu
async def test_a_chain_of_them(tmp_path: Path) -> None:
    await on_disk(tmp_path)
    top = tmp_path / "top.qcow"
    images.create(top, None, fmt="qcow", backing=("x.qcow", "qcow"))
    below = ImageSpec("", "qcow", backing=ImageSpec("", "qcow2"))
    node = await open_image(ImageSpec(str(top), "qcow", backing=below, read_only=True))
    assert [layer.name for layer in node.layers] == ["qcow", "qcow", "qcow2"]
    assert await node.read(0, 512) == b"\x62" * 512
    await node.close()


async def test_the_header_is_read_with_its_name() -> None:
    header = await read_header(await made(backing_file="some base", backing_fmt="raw"))
    assert header.backing_name == "some base"


@images.needs_qemu
@pytest.mark.parametrize("compressed", [False, True])
async def test_a_larger_disk_with_a_longer_l1_table(tmp_path: Path, compressed: bool) -> None:
    """What the cluster at the old end holds behind it does not appear, and stock tools go on."""
    source, path = tmp_path / "source", tmp_path / "a.qcow"
    source.write_bytes(bytes(range(1, 251)) * 4096)
    command = ["qemu-img", "convert", *(["-c"] if compressed else []), "-f", "raw", "-O", "qcow", source, path]
    images.run(*command, codes=(0, 1))  # qemu-img says 1 of compressed qcow images that are right
    data = bytearray(path.read_bytes())
    data[24:32] = (900_096).to_bytes(8, "big")
    path.write_bytes(data)
    storage = await FileStorage.open(str(path))
    driver = await QcowDriver.open(storage, {}, read_only=False)
    for size in (900_608, 20 << 20):
        await driver.resize(size)
    for size, words in ((1 << 20, "must be"), ((20 << 20) + 1, "multiple of 512"), (1 << 60, "to")):
        with pytest.raises(ConfigError, match=words):
            await driver.resize(size)
    await driver.close()
    images.run("qemu-io", "-f", "qcow", "-c", "write -P 7 18M 64k", "-c", "read -P 7 18M 64k", path)
    images.convert(path, "qcow", tmp_path / "out", "raw")
    content = bytearray(source.read_bytes()[:900_096]).ljust(20 << 20, b"\0")
    content[18 << 20 : (18 << 20) + 65536] = b"\x07" * 65536
    assert (tmp_path / "out").read_bytes() == content
    driver = await QcowDriver.open(await FileStorage.open(str(path)), {}, read_only=True)
    assert (await driver.check()).corruptions == 0
    await driver.close()
