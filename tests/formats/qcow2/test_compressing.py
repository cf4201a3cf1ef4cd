from __future__ import annotations

import asyncio
import errno
import random
import zlib
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import RequestError
from nbdserve.formats.qcow2.compressed import decompress
from nbdserve.formats.qcow2.compressing import compress
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.layout import COMPRESSED_FLAG, compressed_entry, compressed_range
from nbdserve.storage.file import FileStorage
from tests.formats.qcow2.engine import check, create, run
from tests.support.images import needs_qemu

CLUSTER = 65536


@pytest.mark.parametrize("compression_type", [0, 1])
def test_what_is_compressed_is_read_again(compression_type: int) -> None:
    text = (b"the same again and again, %d" % 7) * 3000
    stored = compress(text[:CLUSTER], compression_type)
    assert stored is not None
    assert len(stored) < 2000
    assert decompress(stored + b"junk" * 100, CLUSTER, compression_type) == text[:CLUSTER]
    assert compress(random.Random(1).randbytes(CLUSTER), compression_type) is None


def test_the_window_is_one_that_readers_have() -> None:
    block = random.Random(2).randbytes(8192)
    stored = compress(block * 8, 0)
    assert stored is None or zlib.decompressobj(-12).decompress(stored) == block * 8


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_entries(bits: int) -> None:
    choose = random.Random(bits)
    for _ in range(200):
        offset, length = choose.randrange(1, 1 << 40), choose.randrange(1, 1 << bits)
        entry = compressed_entry(offset, length, bits)
        assert entry & COMPRESSED_FLAG
        found, most = compressed_range(entry, bits)
        assert found == offset
        assert length <= most < length + 512


async def disk(path: Path, options: str = "") -> Node:
    create(path, "4M", options)
    return await reopened(path)


async def reopened(path: Path) -> Node:
    return Node(
        [await Qcow2Driver.open(await FileStorage.open(str(path)), {"discard": "unmap"}, read_only=False)], unmap=True
    )


def compressible(seed: int, clusters: int) -> bytes:
    choose = random.Random(seed)
    return b"".join((choose.randbytes(choose.randrange(1, 40000)) + bytes(CLUSTER))[:CLUSTER] for _ in range(clusters))


@needs_qemu
@pytest.mark.parametrize("options", ["", "extended_l2=on", "refcount_bits=1", "refcount_bits=2", "cluster_size=4k"])
async def test_written_over_and_over(tmp_path: Path, options: str) -> None:
    node = await disk(tmp_path / "image", options)
    content = bytearray(4 << 20)
    choose = random.Random(len(options))
    for number in range(40):
        at, clusters = choose.randrange(60) * CLUSTER, choose.randrange(1, 5)
        data = compressible(number, clusters)[: (4 << 20) - at]
        action = choose.randrange(5)
        if action < 3:
            await node.write_compressed(at, data)
        elif action == 3:
            data = data[:5000]
            await node.write(at + 1000, data)
            at += 1000
        else:
            data = bytes(len(data))
            await node.discard(at, len(data))
        content[at : at + len(data)] = data
        if number % 7 == 0:
            await node.flush()
    assert await node.read(0, node.size) == content
    await node.close()
    assert check(tmp_path / "image").get("leaks", 0) == 0
    run("qemu-img", "convert", "-O", "raw", tmp_path / "image", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == content


@needs_qemu
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), asyncio.CancelledError()])
@pytest.mark.parametrize("options", ["", "extended_l2=on"])
async def test_a_write_that_fails_or_is_cancelled_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, options: str
) -> None:
    node = await disk(tmp_path / "image", options)
    await node.write_compressed(0, compressible(1, 3))

    async def refuse(pieces: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(node.data, "write_all", refuse)
        with pytest.raises(type(error)):
            await node.write_compressed(8 * CLUSTER, compressible(2, 3))
        with pytest.raises(type(error)):
            await node.write(100, b"a part of a compressed cluster")
    await node.write_compressed(8 * CLUSTER, compressible(3, 3))
    assert await node.read(8 * CLUSTER, 3 * CLUSTER) == compressible(3, 3)
    await node.close()
    assert check(tmp_path / "image").get("leaks", 0) == 0


@needs_qemu
async def test_what_was_read_where_other_data_is_now_is_not_remembered(tmp_path: Path) -> None:
    node, places = await disk(tmp_path / "image"), set()
    for number in range(4):
        data = bytes([97 + number]) * CLUSTER  # of the same length when compressed
        offset = number * 4 * CLUSTER
        await node.write_compressed(offset, data)
        assert await node.read(offset, CLUSTER) == data
        places.add(node.top.lookup(offset, CLUSTER))
        await node.discard(offset, CLUSTER)
        await node.top.committer.settle()  # type: ignore[attr-defined]
    assert len(places) == 1
    await node.close()


@needs_qemu
async def test_what_is_being_read_where_other_data_is_now_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await disk(tmp_path / "image")
    data = [bytes([letter]) * CLUSTER for letter in b"ab"]
    await node.write_compressed(0, data[0])
    read, reading, go_on = node.data.read, asyncio.Event(), asyncio.Event()

    async def slow(offset: int, length: int) -> bytearray:
        stored = await read(offset, length)
        reading.set()
        await go_on.wait()
        return stored

    with monkeypatch.context() as patched:
        patched.setattr(node.data, "read", slow)
        request = asyncio.create_task(node.read(0, CLUSTER))
        await reading.wait()
        request.cancel()  # its client is gone
        with pytest.raises(asyncio.CancelledError):
            await request
    await node.discard(0, CLUSTER)
    await node.top.committer.settle()  # type: ignore[attr-defined]
    await node.write_compressed(CLUSTER, data[1])
    go_on.set()
    for _ in range(2):
        assert await node.read(CLUSTER, CLUSTER) == data[1]
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
    await node.close()


@needs_qemu
@pytest.mark.parametrize("kept", [0, 1])
async def test_what_is_published_before_a_cancellation_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    node = await disk(tmp_path / "image")
    publish, published = node.top.publish_compressed, []  # type: ignore[attr-defined]

    def some(offset: int, entry: int) -> bool:
        if len(published) == kept:
            raise asyncio.CancelledError
        published.append(offset)
        return bool(publish(offset, entry))

    data = compressible(4, 3)
    with monkeypatch.context() as patched:
        patched.setattr(node.top, "publish_compressed", some)
        with pytest.raises(asyncio.CancelledError):
            await node.write_compressed(0, data)
    expected = bytearray(len(data))
    for offset in published:
        expected[offset : offset + CLUSTER] = data[offset : offset + CLUSTER]
    assert await node.read(0, len(data)) == expected
    await node.close()
    assert check(tmp_path / "image").get("leaks", 0) == 0


@needs_qemu
async def test_what_is_written_while_its_neighbours_are_punched_out_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await disk(tmp_path / "image")
    await node.write_compressed(0, compressible(1, 1))
    await node.flush()
    discard, begun, go_on = node.data.discard, asyncio.Event(), asyncio.Event()

    async def slow(offset: int, length: int) -> None:
        begun.set()
        await go_on.wait()
        await discard(offset, length)

    monkeypatch.setattr(node.data, "discard", slow)
    await node.discard(0, CLUSTER)
    await node.flush()
    await begun.wait()
    await node.write_compressed(CLUSTER, compressible(2, 1))
    go_on.set()
    await node.close()
    assert check(tmp_path / "image").get("leaks", 0) == 0
    node = await reopened(tmp_path / "image")
    assert await node.read(0, 2 * CLUSTER) == bytes(CLUSTER) + compressible(2, 1)
    await node.close()


@needs_qemu
async def test_what_cannot_be(tmp_path: Path) -> None:
    node = await disk(tmp_path / "image")
    for offset, length in ((512, CLUSTER), (0, 512)):
        with pytest.raises(RequestError, match="written whole") as raised:
            await node.write_compressed(offset, bytes(length))
        assert raised.value.errno == errno.EINVAL
    await node.close()
    create(tmp_path / "with-data", "1M", f"data_file={tmp_path}/data")
    storages = [await FileStorage.open(str(tmp_path / name)) for name in ("with-data", "data")]
    node = Node([await Qcow2Driver.open(storages[0], {"companions": storages[1:]}, read_only=False)])
    with pytest.raises(RequestError, match="in a file of its own"):
        await node.write_compressed(0, bytes(CLUSTER))
    await node.close()
