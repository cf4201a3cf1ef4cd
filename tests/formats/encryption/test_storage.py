"""The encrypting storage: whole sectors underneath, any byte range on top, and nobody sees a sector half converted."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from nbdserve.extents import DATA
from nbdserve.formats.encryption.ciphers import IvGenerator
from nbdserve.formats.encryption.storage import INLINE, EncryptedStorage
from nbdserve.formats.encryption.xts import XtsCipher
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB, SECTOR_SIZE

CIPHER = XtsCipher(bytes(range(64)), IvGenerator("plain64"))
START = 8 * SECTOR_SIZE


class SlowStorage(MemoryStorage):
    """Gives way to others in the middle of each read and write, which are done one half after the other."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        half = len(buffer) // 2
        await super().read_into(offset, buffer[:half])
        await asyncio.sleep(0)
        await super().read_into(offset + half, buffer[half:])

    async def write(self, offset: int, data: ReadBuffer) -> None:
        half = len(data) // 2
        await super().write(offset, memoryview(data)[:half])
        await asyncio.sleep(0)
        await super().write(offset + half, memoryview(data)[half:])


def encrypted(content: bytes, inner: MemoryStorage | None = None) -> EncryptedStorage:
    """A storage that holds ``content``."""
    inner = inner or MemoryStorage()
    inner._store(0, b"h" * START)
    inner._store(START, CIPHER.encrypt(0, content))
    inner.size = START + len(content)
    return EncryptedStorage(inner, CIPHER, start=START)


@pytest.mark.parametrize("slow", [False, True])
async def test_any_range_is_read_and_written(slow: bool) -> None:
    rng = random.Random(5)
    model = bytearray(os.urandom(MIB))
    inner = SlowStorage() if slow else MemoryStorage()
    storage = encrypted(bytes(model), inner)
    assert storage.size == len(model)
    for _ in range(400):
        length = rng.choice([1, 15, 511, 512, 513, 4096, 5000, 65_536, 150_000, INLINE, INLINE + 512])
        offset = rng.randrange(len(model) - length)
        if rng.random() < 0.5:
            offset, length = offset // 512 * 512, (length + 511) // 512 * 512
        data = rng.randbytes(length)
        buffer = bytearray(length)
        kind = rng.randrange(5)
        if kind == 0:
            await storage.write(offset, data)
            model[offset : offset + length] = data
        elif kind == 1 and storage.try_write(offset, data):
            model[offset : offset + length] = data
        elif kind == 2 and not storage.try_read_into(offset, memoryview(buffer)):
            assert length > INLINE
        elif kind == 3:
            await storage.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            assert await storage.read(offset, length) == model[offset : offset + length]
        if kind == 2 and length <= INLINE:
            assert buffer == model[offset : offset + length]
    assert await storage.read(0, len(model)) == model
    assert inner._pages[0][:START] == b"h" * START, "what precedes the first sector is left alone"
    assert CIPHER.encrypt(0, model) == await inner.read(START, len(model))


async def test_what_is_done_without_waiting() -> None:
    storage = encrypted(bytes(MIB))
    assert storage.try_write(0, bytes(INLINE))
    assert not storage.try_write(0, bytes(INLINE + 512)), "so much is encrypted by a worker thread"
    assert not storage.try_write(1, bytes(512)), "a part of a sector must be read first"
    assert not storage.try_write(0, bytes(511))
    assert storage.try_read_into(3, memoryview(bytearray(700)))
    assert not storage.try_read_into(0, memoryview(bytearray(INLINE + 1)))
    assert not storage.can_send(0, 512)


async def test_parts_of_one_sector_written_together_are_both_there() -> None:
    storage = encrypted(b"." * 2048, SlowStorage())
    await storage.write_all([(10, b"one"), (20, b"two"), (512, b"x" * 512), (30, b"three"), (40, b"")])
    expected = bytearray(b"." * 2048)
    expected[10:13], expected[20:23], expected[30:35], expected[512:1024] = b"one", b"two", b"three", b"x" * 512
    assert await storage.read(0, 2048) == expected


async def test_bytes_that_nobody_writes_never_change() -> None:
    """Writers of the other bytes of the sectors, and a reader, all at once."""
    content = bytes(4 * SECTOR_SIZE)
    storage = encrypted(content, SlowStorage())
    rng = random.Random(1)
    running = True

    async def writer(number: int) -> None:
        for _ in range(60):
            at = rng.randrange(4) * SECTOR_SIZE + 100 * number + 7
            await storage.write(at, bytes([number]) * 50)
            await asyncio.sleep(0)

    async def over(number: int) -> None:
        for _ in range(60):
            if not storage.try_write(2 * SECTOR_SIZE, bytes(SECTOR_SIZE)):
                await storage.write_all([(2 * SECTOR_SIZE, bytes(SECTOR_SIZE)), (0, bytes(SECTOR_SIZE))])
            await asyncio.sleep(0)

    async def reader() -> None:
        while running:
            buffer = bytearray(len(content))
            if not storage.try_read_into(0, memoryview(buffer)):
                await storage.read_into(0, memoryview(buffer))
            for start in range(0, len(content), SECTOR_SIZE):
                assert buffer[start : start + 107] == bytes(107)
                for number in range(1, 5):
                    part = buffer[start + 100 * number + 7 : start + 100 * number + 57]
                    assert set(part) in ({0}, {number}), "a part that was never written as a whole"
            await asyncio.sleep(0)

    reading = asyncio.create_task(reader())
    await asyncio.gather(*(writer(number) for number in range(1, 5)), over(0))
    running = False
    await reading
    assert not storage._uses


async def test_a_cancelled_waiter_holds_nobody_up() -> None:
    storage = encrypted(bytes(4096), SlowStorage())
    first = asyncio.create_task(storage.write(0, b"a" * 100))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(storage.write(0, b"b" * 100))
    last = asyncio.create_task(storage.write(50, b"c" * 100))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(first, last)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await storage.read(0, 200) == b"a" * 50 + b"c" * 100 + bytes(50)


async def test_a_large_range_is_converted_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = encrypted(bytes(MIB))
    threads: list[threading.Thread] = []

    def noting(convert: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            threads.append(threading.current_thread())
            return convert(*arguments)

        return call

    for name in ("encrypt", "decrypt"):
        monkeypatch.setattr(CIPHER, name, noting(getattr(CIPHER, name)))
    await storage.write(0, memoryview(bytearray(MIB)))
    assert await storage.read(0, MIB) == bytes(MIB)
    assert threads
    assert threading.current_thread() not in threads


async def test_zeroes_are_written_and_never_punched() -> None:
    inner = MemoryStorage()
    storage = encrypted(os.urandom(8192), inner)
    await storage.zero(0, 4096, unmap=True)
    assert await storage.read(0, 4096) == bytes(4096)
    assert await inner.read(START, 4096) == CIPHER.encrypt(0, bytes(4096))
    with pytest.raises(OSError, match="encrypted") as caught:
        await storage.zero(0, 4096, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    before = await inner.read(0, inner.size)
    await storage.discard(0, 8192)
    assert await inner.read(0, inner.size) == before
    assert not storage.grows_zeroed


async def test_every_byte_is_data() -> None:
    storage = EncryptedStorage(MemoryStorage(size=MIB), CIPHER)
    runs = await storage.host_map(0, MIB)
    assert (runs.start.tolist(), runs.length.tolist(), runs.kind.tolist()) == ([0], [MIB], [DATA])


async def test_the_size_is_that_of_the_rest_of_the_file() -> None:
    inner = MemoryStorage(size=START + 1024)
    storage = EncryptedStorage(inner, CIPHER, start=START)
    assert storage.size == 1024
    await storage.truncate(4096)
    assert (inner.size, storage.size) == (START + 4096, 4096)
    await inner.truncate(100)
    assert storage.size == 0
    await storage.close()
    assert not inner.try_read_into(0, memoryview(bytearray(1)))


def test_small_reads_and_writes_are_gathered() -> None:
    content = os.urandom(64 * KIB)
    inner = MemoryStorage()
    storage = encrypted(content, inner)
    ciphertext = bytes(CIPHER.encrypt(0, content))
    storage.reads, storage.writes = [], []
    buffers = {at: memoryview(bytearray(length)) for at, length in ((0, 4096), (8192, 512), (100, 50), (512, 32 * KIB))}
    for at, buffer in buffers.items():
        assert storage.try_read_into(at, buffer)
    assert [(sector, len(buffer)) for sector, buffer in storage.reads] == [(0, 4096), (16, 512)]
    assert buffers[0] == ciphertext[:4096]
    assert buffers[100] == content[100:150], "a part of a sector is decrypted at once"
    assert buffers[512] == content[512 : 512 + 32 * KIB], "what is long, too"
    storage.cipher.decrypt_each(storage.reads)
    assert all(buffer == content[at : at + len(buffer)] for at, buffer in buffers.items())

    assert storage.try_write(4096, b"w" * 4096)
    assert storage.try_write(16384, b"w" * 32 * KIB)
    assert not storage.try_write(10, b"w"), "a part of a sector waits for the rest of it"
    assert [(place, sector) for _, place, (sector, _) in storage.writes] == [(START + 4096, 8)]
    assert inner._pages[0][START + 4096 : START + 8192] == ciphertext[4096:8192], "it is not written yet"


async def test_the_file_is_what_is_extended_and_written_back() -> None:
    class Told(MemoryStorage):
        begun = 0

        def begin_writeback(self) -> None:
            self.begun += 1

    inner = Told()
    storage = encrypted(bytes(SECTOR_SIZE), inner)
    storage.begin_writeback()
    await storage.extend(4 * KIB)
    assert inner.begun == 1
    assert inner.size == START + 4 * KIB
    await storage.extend(KIB)
    assert storage.size == 4 * KIB
