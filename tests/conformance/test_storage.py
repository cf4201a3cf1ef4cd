"""One suite over every storage: what the contract in ``nbdserve.storage.base`` promises."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nbdserve.extents import DATA, ZERO, RunArray
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.storage.syscalls import TMPFS_MAGIC, file_system_type
from nbdserve.units import KIB, MIB

KINDS = ("file", "direct", "unsafe", "tmpfs", "memory")


@contextlib.contextmanager
def tmpfs_directory() -> Iterator[Path]:
    """A directory in memory; skips where /dev/shm is none."""
    shm = Path("/dev/shm")
    fd = os.open(shm, os.O_RDONLY) if shm.is_dir() else -1
    try:
        if fd < 0 or file_system_type(fd) != TMPFS_MAGIC or not os.access(shm, os.W_OK):
            pytest.skip("/dev/shm is no writable tmpfs")
    finally:
        if fd >= 0:
            os.close(fd)
    with tempfile.TemporaryDirectory(dir=shm) as directory:
        yield Path(directory)


@contextlib.contextmanager
def loop_device(size: int) -> Iterator[str]:
    """A block device over a file; skips without the right to make one."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(size)
        if shutil.which("losetup") is None:
            pytest.skip("losetup is not installed")
        made = subprocess.run(["losetup", "-f", "--show", file.name], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no loop device: {made.stderr.strip()}")
        device = made.stdout.strip()
        try:
            yield device
        finally:
            subprocess.run(["losetup", "-d", device], check=True)


async def make(kind: str, directory: Path) -> Storage:
    if kind == "memory":
        return MemoryStorage()
    cache = {"direct": "none", "unsafe": "unsafe"}.get(kind, "writeback")
    try:
        return await FileStorage.open(str(directory / "disk"), create=True, cache=cache)
    except Exception as error:
        if kind == "direct" and "direct I/O" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=KINDS)
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    with tmpfs_directory() if request.param == "tmpfs" else contextlib.nullcontext(tmp_path) as directory:
        made = await make(request.param, directory)
        yield made
        await made.close()


def runs(array: RunArray) -> list[tuple[int, int, int]]:
    return list(zip(array.start.tolist(), array.length.tolist(), array.kind.tolist(), strict=True))


async def test_starts_empty_and_reads_zeroes_past_the_end(storage: Storage) -> None:
    assert storage.size == 0
    buffer = bytearray(b"\xff" * 5000)
    await storage.read_into(12345, memoryview(buffer))
    assert buffer == bytes(5000)


async def test_write_grows_and_reads_back(storage: Storage) -> None:
    data = random.Random(1).randbytes(200_001)
    await storage.write(3333, data)
    assert storage.size == 3333 + len(data)
    assert await storage.read(0, storage.size + 100) == bytes(3333) + data + bytes(100)


@pytest.mark.parametrize("view", [bytes, bytearray, lambda data: memoryview(bytearray(data)), memoryview])
async def test_every_kind_of_buffer_is_written(storage: Storage, view: type) -> None:
    await storage.write(1, view(b"abc"))
    storage.try_write(10, view(b"def"))
    await storage.write_all([(20, view(b"ghi")), (512, view(bytes(512)))])
    assert await storage.read(1, 3) == b"abc"
    assert await storage.read(20, 3) == b"ghi"


async def test_empty_transfers(storage: Storage) -> None:
    await storage.write(100, b"")
    await storage.write_all([])
    assert storage.size == 0
    await storage.read_into(0, memoryview(bytearray()))
    await storage.zero(100, 0)
    await storage.discard(0, 0)
    assert storage.size == 0


async def test_write_all_writes_every_piece(storage: Storage) -> None:
    pieces = [(MIB, b"a" * 512), (0, b"b" * 4096), (4096, b"c"), (5 * MIB + 7, b"d" * 100)]
    await storage.write_all(pieces)
    assert storage.size == 5 * MIB + 107
    for offset, data in pieces:
        assert await storage.read(offset, len(data)) == data


async def test_attempts_agree_with_the_other_form(storage: Storage) -> None:
    data = random.Random(2).randbytes(64 * KIB)
    await storage.write(0, data)
    written = storage.try_write(4096, b"x" * 4096)
    expected = data[:4096] + b"x" * 4096 + data[8192:] if written else data
    buffer = bytearray(64 * KIB)
    if storage.try_read_into(0, memoryview(buffer)):
        assert buffer == expected
    assert await storage.read(0, 64 * KIB) == expected


async def test_attempts_past_the_end(storage: Storage) -> None:
    await storage.write(0, b"a" * 1000)
    buffer = bytearray(b"\xff" * 1000)
    if storage.try_read_into(500, memoryview(buffer)):
        assert buffer == b"a" * 500 + bytes(500)
    if storage.try_write(5000, b"b" * 10):
        assert storage.size == 5010
        assert await storage.read(1000, 4010) == bytes(4000) + b"b" * 10
    else:
        assert storage.size == 1000


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (4096, 8192), (1000, 5000), (100_000, MIB), (60_000, 200_000)])
async def test_zero(storage: Storage, unmap: bool, offset: int, length: int) -> None:
    model = bytearray(b"a" * 128 * KIB)
    await storage.write(0, model)
    await storage.zero(offset, length, unmap=unmap)
    model.extend(bytes(max(0, offset + length - len(model))))
    model[offset : offset + length] = bytes(length)
    assert storage.size == len(model)
    assert await storage.read(0, len(model)) == model


async def test_fast_zero_is_done_or_leaves_the_content(storage: Storage) -> None:
    await storage.write(0, b"a" * 128 * KIB)
    try:
        await storage.zero(4096, 8192, fast=True)
    except OSError as error:
        assert error.errno == errno.ENOTSUP
        assert await storage.read(0, 128 * KIB) == b"a" * 128 * KIB
    else:
        assert await storage.read(0, 16 * KIB) == b"a" * 4096 + bytes(8192) + b"a" * 4096


async def test_unmap_gives_space_back_and_its_absence_keeps_it(storage: Storage) -> None:
    await storage.write(0, b"a" * MIB)
    await storage.flush()
    await storage.zero(0, MIB // 2, unmap=True)
    assert storage.allocated_size() <= MIB // 2 + 64 * KIB
    await storage.zero(MIB // 2, MIB // 2, unmap=False)
    if isinstance(storage, FileStorage):
        assert storage.allocated_size() >= MIB // 2
    assert await storage.read(0, MIB) == bytes(MIB)


async def test_zero_far_past_the_end_is_cheap(storage: Storage) -> None:
    await storage.zero(MIB, 1 << 40)
    assert storage.size == MIB + (1 << 40)
    assert storage.allocated_size() <= MIB
    assert await storage.read(1 << 39, 512) == bytes(512)


async def test_discard_leaves_the_rest_and_the_size(storage: Storage) -> None:
    await storage.write(0, b"a" * 256 * KIB)
    await storage.discard(64 * KIB + 100, 64 * KIB)
    await storage.discard(200 * KIB, MIB)
    await storage.discard(MIB, MIB)
    assert storage.size == 256 * KIB
    assert await storage.read(0, 64 * KIB + 100) == b"a" * (64 * KIB + 100)
    assert await storage.read(128 * KIB + 100, 64 * KIB) == b"a" * 64 * KIB


async def test_truncate(storage: Storage) -> None:
    await storage.write(0, b"a" * 100_000)
    await storage.truncate(1000)
    assert storage.size == 1000
    await storage.truncate(200_000)
    assert storage.size == 200_000
    assert await storage.read(0, 200_000) == b"a" * 1000 + bytes(199_000)


async def test_host_map_covers_the_range_and_never_calls_data_a_hole(storage: Storage) -> None:
    size = 4 * MIB
    await storage.truncate(size)
    written = [(0, 100), (MIB, 128 * KIB), (2 * MIB + 5, 10)]
    for offset, length in written:
        await storage.write(offset, b"a" * length)
    found = await storage.host_map(0, size + MIB)
    position = 0
    for start, length, kind in runs(found):
        assert (start, length > 0) == (position, True)
        position += length
        if kind == ZERO:
            assert all(start + length <= offset or start >= offset + count for offset, count in written)
    assert position == size + MIB
    assert runs(found)[-1][2] == ZERO
    assert (found.host_offset == found.start)[found.kind == DATA].all()
    assert (found.host_offset == -1)[found.kind == ZERO].all()


async def test_host_map_starts_and_stops_where_asked(storage: Storage) -> None:
    await storage.write(0, b"a" * 64 * KIB)
    await storage.write(128 * KIB, b"a" * 64 * KIB)
    await storage.write(256 * KIB, b"a" * 64 * KIB)
    inside = await storage.host_map(1000, 2000)
    assert runs(inside) == [(1000, 2000, DATA)]
    assert len(await storage.host_map(0, 320 * KIB, max_runs=2)) == 2
    assert runs(await storage.host_map(10 * MIB, MIB)) == [(10 * MIB, MIB, ZERO)]


async def test_flush_many_at_once(storage: Storage) -> None:
    await storage.write(0, b"a" * 4096)
    await asyncio.gather(*(storage.flush() for _ in range(20)))
    await storage.flush()


async def test_random_changes_match_a_model(storage: Storage) -> None:
    chance = random.Random(3)
    size = 512 * KIB
    model = bytearray(size)
    await storage.truncate(size)
    for _ in range(150):
        granularity = chance.choice([1, 512, 4096])
        offset = chance.randrange(size) // granularity * granularity
        length = min(chance.choice([1, 511, 512, 4096, 65536, 70_000]), size - offset)
        match chance.randrange(5):
            case 0:
                await storage.zero(offset, length, unmap=chance.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 1:
                assert await storage.read(offset, length) == model[offset : offset + length]
            case 2:
                data = chance.randbytes(length)
                if not storage.try_write(offset, data):
                    await storage.write(offset, data)
                model[offset : offset + length] = data
            case 3:
                data = chance.randbytes(length)
                await storage.write_all([(offset, data)])
                model[offset : offset + length] = data
            case 4:
                data = chance.randbytes(length)
                await storage.write(offset, data)
                model[offset : offset + length] = data
    assert storage.size == size
    assert await storage.read(0, size) == model


async def test_neighbours_written_at_once_all_arrive(storage: Storage) -> None:
    """Writes that share blocks, at once: a read-modify-write must not undo a neighbour."""
    pieces = [(index * 100, bytes([index % 251 + 1]) * 100) for index in range(400)]
    random.Random(4).shuffle(pieces)
    await asyncio.gather(*(storage.write(offset, data) for offset, data in pieces))
    expected = b"".join(data for _, data in sorted(pieces))
    assert storage.size == len(expected)
    assert await storage.read(0, len(expected)) == expected


async def test_growing_at_once_never_cuts_off(storage: Storage) -> None:
    async def grow(index: int) -> None:
        offset = index * 4096
        if index % 2:
            await storage.zero(offset, 4096, unmap=index % 4 == 1)
        else:
            await storage.write(offset, b"a" * 4096)

    await asyncio.gather(*(grow(index) for index in random.Random(5).sample(range(100), 100)))
    assert storage.size == 100 * 4096
    content = await storage.read(0, storage.size)
    for index in range(100):
        assert content[index * 4096] == (0 if index % 2 else ord("a")), index


async def test_a_cancelled_write_has_ended_when_the_await_returns(storage: Storage) -> None:
    await storage.truncate(MIB)
    buffer = bytearray(b"a" * MIB)
    task = asyncio.create_task(storage.write(0, buffer))
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    buffer[:] = bytes(MIB)
    content = await storage.read(0, MIB)
    assert content in (b"a" * MIB, bytes(MIB))
    assert await storage.read(0, MIB) == content


async def test_close_is_idempotent_and_final(storage: Storage) -> None:
    await storage.write(0, b"a" * 4096)
    await storage.close()
    await storage.close()
    assert not storage.try_read_into(0, memoryview(bytearray(10)))
    assert not storage.try_write(0, b"a")
    with pytest.raises(OSError, match="closed"):
        await storage.read(0, 10)
    with pytest.raises(OSError, match="closed"):
        await storage.write(0, b"a")


async def test_close_waits_for_what_is_running(storage: Storage) -> None:
    calls = [asyncio.create_task(storage.write(index * MIB, b"a" * MIB)) for index in range(8)]
    await asyncio.sleep(0)
    await storage.close()
    await asyncio.gather(*calls)


async def test_read_only(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 8192)
    storage = await FileStorage.open(str(path), read_only=True)
    assert storage.read_only
    assert await storage.read(0, 10) == b"a" * 10
    assert not storage.try_write(0, b"b")
    changes: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: storage.write(0, b"b"),
        lambda: storage.write_all([(0, b"b")]),
        lambda: storage.zero(0, 1),
        lambda: storage.discard(0, 1),
        lambda: storage.truncate(0),
    )
    for call in changes:
        with pytest.raises(OSError) as caught:
            await call()
        assert caught.value.errno == errno.EROFS
    await storage.flush()
    await storage.close()
    assert path.read_bytes() == b"a" * 8192


@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_block_device(cache: str) -> None:
    with loop_device(8 * MIB) as device:
        storage = await FileStorage.open(device, cache=cache)
        try:
            assert storage.size == 8 * MIB
            assert storage.allocated_size() == 8 * MIB
            assert not storage.grows_zeroed
            model = bytearray(random.Random(6).randbytes(8 * MIB))
            await storage.write(0, model)
            for offset, length in ((4096, 8192), (100, 10_000), (65, 7), (8 * MIB - 3, 3)):
                await storage.zero(offset, length, unmap=length < 10_000)
                model[offset : offset + length] = bytes(length)
            await storage.write(777, b"x" * 1000)
            model[777:1777] = b"x" * 1000
            assert await storage.read(0, 8 * MIB) == model
            with pytest.raises(OSError) as caught:
                await storage.zero(100, 1000, fast=True)
            assert caught.value.errno == errno.ENOTSUP
            assert await storage.read(0, 8 * MIB) == model
            await storage.discard(MIB + 1, MIB)
            assert await storage.read(0, MIB + 1) == model[: MIB + 1]
            assert await storage.read(2 * MIB + 1, MIB) == model[2 * MIB + 1 : 3 * MIB + 1]
            assert runs(await storage.host_map(0, 8 * MIB)) == [(0, 8 * MIB, DATA)]
            await storage.flush()
            await storage.truncate(MIB)
            assert storage.size == 8 * MIB
            with pytest.raises(OSError, match="cannot grow"):
                await storage.truncate(16 * MIB)
            with pytest.raises(OSError) as caught:
                await storage.write(8 * MIB, b"x" * 512)
            assert caught.value.errno == errno.ENOSPC
        finally:
            await storage.close()
