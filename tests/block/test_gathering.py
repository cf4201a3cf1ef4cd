"""What is gathered from encrypted layers is finished together, and nothing of it is lost or shown half done."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from nbdserve.block.forms import READ_DATA, READ_WAIT
from nbdserve.block.gathering import GatheringNode
from nbdserve.block.node import Node
from nbdserve.block.watchers import Watcher
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT
from nbdserve.extents import DATA, Run
from nbdserve.formats.encryption.ciphers import IvGenerator
from nbdserve.formats.encryption.storage import EncryptedStorage
from nbdserve.formats.encryption.xts import XtsCipher
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB

CIPHER = XtsCipher(bytes(range(64)), IvGenerator("plain64"))
SIZE = 256 * KIB


class Busy(MemoryStorage):
    """Has writes wait while ``busy``; ``broken``: they fail."""

    busy = broken = False

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return not (self.busy or self.broken) and super().try_write(offset, data)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        if self.broken:
            raise OSError(5, "broken")
        super().try_write(offset, data)


class Encrypted(RawDriver):
    """All of the disk is in an encrypted storage, behind a mapping."""

    unallocated = False

    def __init__(self, storage: EncryptedStorage) -> None:
        super().__init__(storage, 0, storage.size, read_only=False)

    def linear_offset(self) -> Any:
        return None

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        return None if self.unallocated else (DATA, length, offset)


class Disk:
    """A gathering node, its content in plain, and who was told of which write."""

    def __init__(self) -> None:
        self.content = bytearray(os.urandom(SIZE))
        self.inner = Busy(bytes(CIPHER.encrypt(0, self.content)))
        self.driver = Encrypted(EncryptedStorage(self.inner, CIPHER))
        self.node = Node([self.driver])
        gathering = GatheringNode.of(self.node)
        assert gathering is not None
        self.gathering = gathering
        self.told: dict[int, Exception | None] = {}

    def write(self, offset: int, data: bytes) -> int:
        outcome = self.gathering.submit_write(
            offset, memoryview(data), lambda error: self.told.__setitem__(offset, error)
        )
        if outcome != WRITE_WAIT:
            self.content[offset : offset + len(data)] = data
        return outcome

    def plain(self) -> bytes:
        stored = bytearray(SIZE)
        self.inner.try_read_into(0, memoryview(stored))
        CIPHER.decrypt(0, memoryview(stored))
        return bytes(stored)


def test_a_node_without_encryption_has_nothing_to_gather() -> None:
    assert GatheringNode.of(Node([RawDriver(MemoryStorage(size=KIB), 0, KIB, read_only=False)])) is None


async def test_reads_are_decrypted_at_the_end() -> None:
    disk, rng = Disk(), random.Random(1)
    for count in (1, 2, 40):
        places = [rng.randrange(SIZE // 512 - 64) * 512 for _ in range(count)]
        buffers = [memoryview(bytearray(rng.choice([512, 4096, 20_480]))) for _ in places]
        for place, buffer in zip(places, buffers, strict=True):
            assert disk.gathering.try_read_into(place, buffer) == READ_DATA
        disk.gathering.finish()
        for place, buffer in zip(places, buffers, strict=True):
            assert buffer == disk.content[place : place + len(buffer)]
    disk.gathering.finish()


async def test_others_read_decrypted_data_meanwhile() -> None:
    disk = Disk()
    disk.gathering.try_read_into(0, memoryview(bytearray(4096)))
    buffer = memoryview(bytearray(4096))
    assert disk.node.try_read_into(8192, buffer) == READ_DATA
    assert buffer == disk.content[8192:12288]
    assert await disk.node.read(0, 4096) == disk.content[:4096]


async def test_overwrites_are_done_and_told_at_the_end() -> None:
    disk = Disk()
    changes = disk.node.changes
    for number in range(20):
        assert disk.write(number * 8192, os.urandom(4096)) == WRITE_TAKEN
    assert not disk.told
    disk.gathering.finish()
    assert disk.told == {number * 8192: None for number in range(20)}
    assert disk.plain() == disk.content
    assert disk.node.changes > changes


async def test_overwrites_whose_place_is_known_at_one_look_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encrypted, "linear_offset", lambda self: 0)
    disk = Disk()
    changes = disk.node.changes
    for number in range(5):
        assert disk.write(number * 8192, os.urandom(4096)) == WRITE_TAKEN
    assert not disk.told
    assert disk.node.changes == changes + 5
    disk.gathering.finish()
    assert len(disk.told) == 5
    assert disk.plain() == disk.content


async def test_long_writes_and_parts_of_sectors_go_the_nodes_way() -> None:
    disk = Disk()
    assert disk.write(0, os.urandom(64 * KIB)) == WRITE_DONE
    assert disk.write(100 * KIB + 1, b"x") == WRITE_TAKEN
    disk.gathering.finish()
    while not disk.told:
        await asyncio.sleep(0)
    assert disk.told == {100 * KIB + 1: None}
    assert disk.plain() == disk.content
    disk.driver.unallocated = True
    assert disk.write(0, bytes(512)) == WRITE_WAIT


@pytest.mark.parametrize("broken", [False, True])
async def test_a_write_that_has_to_wait_after_all(broken: bool) -> None:
    disk = Disk()
    data = bytearray(os.urandom(4096))
    assert disk.write(0, data) == WRITE_TAKEN
    assert disk.write(4096, bytes(512)) == WRITE_TAKEN
    disk.inner.busy, disk.inner.broken = not broken, broken
    disk.gathering.finish()
    changes = disk.node.changes
    data[:] = bytes(4096)  # the client's buffer is used again
    assert not disk.told
    while len(disk.told) < 2:
        await asyncio.sleep(0)
    assert [isinstance(error, OSError) for error in disk.told.values()] == [broken] * 2
    assert disk.node.changes > changes, "a flush from now on covers it"
    assert broken or disk.plain() == disk.content


async def test_nothing_is_gathered_while_requests_are_held_back() -> None:
    disk = Disk()
    async with disk.node.drained():
        assert disk.gathering.try_read_into(0, memoryview(bytearray(512))) == READ_WAIT
        assert disk.write(0, bytes(512)) == WRITE_WAIT
    disk.gathering.finish()
    assert disk.plain() == disk.content


async def test_watchers_are_told_of_gathered_writes() -> None:
    disk = Disk()
    seen: list[tuple[int, int]] = []

    class Marks(Watcher):
        def changed(self, offset: int, length: int) -> None:
            seen.append((offset, length))

    disk.node.watch(Marks())
    disk.write(512, bytes(1024))
    disk.gathering.finish()
    assert seen == [(512, 1024)]
