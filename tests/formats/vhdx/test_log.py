"""Log entries, both ways, and which of them are to be replayed."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.vhdx import log as log_module
from nbdserve.formats.vhdx.layout import NO_GUID, Header, sealed
from nbdserve.formats.vhdx.log import (
    DATA_DESCRIPTOR,
    ENTRY_HEAD,
    PAGE,
    ZERO_DESCRIPTOR,
    Change,
    LogReader,
    build_entry,
    entry_length,
    pages_that_fit,
)
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB
from tests.formats.vhdx.helpers import qemu_image
from tests.support import images
from tests.support.images import needs_qemu

GUID = uuid4()
HEADER = Header(1, uuid4(), uuid4(), GUID, MIB, MIB)
rng = random.Random(7)
PAGES = [(at * MIB, rng.randbytes(PAGE)) for at in range(2, 200)]


def _entry(pages: int, number: int, tail: int, *, guid: UUID = GUID, flushed: int = 0, last: int = 0) -> bytes:
    return build_entry(PAGES[:pages], sequence_number=number, tail=tail, log_guid=guid, flushed=flushed, last=last)


def _log(*placed: tuple[int, bytes], size: int = 4 * MIB) -> LogReader:
    """A log with entries at positions; one that goes past the end goes on at the start."""
    ring = bytearray(MIB)
    for position, entry in placed:
        first = min(len(entry), MIB - position)
        ring[position : position + first] = entry[:first]
        ring[: len(entry) - first] = entry[first:]
    storage = MemoryStorage(size=size)
    assert storage.try_write(MIB, ring)
    return LogReader(storage, HEADER)


async def _numbers(reader: LogReader) -> list[int]:
    return [entry.sequence_number for entry in await reader.active_sequence()]


@pytest.mark.parametrize("count", [0, 1, 125, 126, 127, 198])
async def test_an_entry_there_and_back(count: int) -> None:
    entry = _entry(count, (5 << 32) + 9, 0)
    assert len(entry) == entry_length(count)
    assert len(entry) % PAGE == 0
    reader = _log((0, entry))
    sequence = await reader.active_sequence()
    assert [found.length for found in sequence] == [len(entry)]
    assert await reader.changes(sequence) == [Change(offset, PAGE, page) for offset, page in PAGES[:count]]


def test_how_many_pages_fit() -> None:
    for length in (PAGE, 2 * PAGE, 127 * PAGE, 128 * PAGE, MIB // 3 // PAGE * PAGE, MIB):
        count = pages_that_fit(length)
        assert entry_length(count) <= length < entry_length(count + 1)


async def test_an_empty_log_is_not_even_read() -> None:
    storage = MemoryStorage(size=4 * MIB)
    assert storage.try_write(MIB, _entry(1, 1, 0, guid=NO_GUID))
    assert await LogReader(storage, HEADER.next(log_guid=NO_GUID)).active_sequence() == []


@pytest.mark.parametrize("at", [0, 4, 8, 12, 16, 24, 32, 48, 64, 70, 80, 4096, 4100, 5000, 8191])
async def test_a_torn_entry_is_not_valid(at: int) -> None:
    entry = bytearray(_entry(1, 3, 0))
    entry[at] ^= 0x10
    assert await _numbers(_log((0, bytes(entry)))) == []


async def test_a_sequence_begins_at_the_tail_of_its_newest_entry() -> None:
    size = entry_length(2)
    reader = _log((0, _entry(2, 5, 0)), (size, _entry(2, 6, size)), (2 * size, _entry(2, 7, size)))
    assert await _numbers(reader) == [6, 7]


async def test_entries_of_another_life_are_not_of_the_sequence() -> None:
    size = entry_length(1)
    assert await _numbers(_log((0, _entry(1, 5, 0)), (size, _entry(1, 9, size, guid=uuid4())))) == [5]


async def test_the_greatest_numbers_win() -> None:
    size = entry_length(1)
    reader = _log((0, _entry(1, 50, 0)), (size, _entry(1, 51, 0)), (20 * size, _entry(1, 49, 20 * size)))
    assert await _numbers(reader) == [50, 51]


async def test_an_entry_that_has_lost_its_tail_heads_nothing() -> None:
    size = entry_length(1)
    reader = _log((0, _entry(1, 5, 0)), (2 * size, _entry(1, 7, size)))
    assert await _numbers(reader) == [5]


async def test_a_gap_in_the_numbers_ends_a_sequence() -> None:
    size = entry_length(1)
    assert await _numbers(_log((0, _entry(1, 5, 0)), (size, _entry(1, 7, 0)))) == [5]


async def test_the_log_is_a_ring() -> None:
    size = entry_length(3)
    first = MIB - size - PAGE
    reader = _log((first, _entry(3, 5, first)), (MIB - PAGE, _entry(3, 6, first)), (size - PAGE, _entry(3, 7, first)))
    sequence = await reader.active_sequence()
    assert [entry.sequence_number for entry in sequence] == [5, 6, 7]
    changes = await reader.changes(sequence)
    assert [change.data for change in changes] == [page for _, page in PAGES[:3]] * 3


async def test_a_truncated_file_is_refused() -> None:
    reader = _log((0, _entry(1, 5, 0, flushed=4 * MIB + 1)))
    with pytest.raises(CorruptImageError, match="FlushedFileOffset"):
        await reader.active_sequence()
    assert await _numbers(_log((0, _entry(1, 5, 0, flushed=4 * MIB)))) == [5]


def _crafted(descriptors: list[bytes], sectors: int, number: int = 5) -> bytes:
    head = ENTRY_HEAD.build(
        {
            "signature": b"loge",
            "checksum": 0,
            "entry_length": PAGE * (1 + sectors),
            "tail": 0,
            "sequence_number": number,
            "descriptor_count": len(descriptors),
            "reserved": 0,
            "log_guid": GUID.bytes_le,
            "flushed_file_offset": 0,
            "last_file_offset": 0,
        }
    )
    sector = struct.pack("<4sI4084sI", b"data", 0, b"x" * 4084, number)
    return sealed((head + b"".join(descriptors)).ljust(PAGE, b"\0") + sector * sectors)


def _zero(offset: int, length: int, number: int = 5) -> bytes:
    return ZERO_DESCRIPTOR.pack(b"zero", 0, length, offset, number)


def _data(offset: int, number: int = 5) -> bytes:
    return DATA_DESCRIPTOR.pack(b"desc", b"tail", b"the head", offset, number)


async def test_zero_descriptors() -> None:
    reader = _log((0, _crafted([_zero(3 * MIB, 2 * MIB), _data(2 * MIB)], 1)))
    assert await reader.changes(await reader.active_sequence()) == [
        Change(3 * MIB, 2 * MIB, None),
        Change(2 * MIB, PAGE, b"the head" + b"x" * 4084 + b"tail"),
    ]


@pytest.mark.parametrize(
    "entry",
    [
        _crafted([_data(2 * MIB)], 0),
        _crafted([_data(2 * MIB)], 2),
        _crafted([_data(2 * MIB, 4)], 1),
        _crafted([_data(2 * MIB)], 1, 0),
        _crafted([b"none".ljust(32)], 0),
    ],
    ids=["sector missing", "sector too many", "other number", "number 0", "no descriptor"],
)
async def test_entries_of_the_wrong_form(entry: bytes) -> None:
    assert await _numbers(_log((0, entry))) == []


@pytest.mark.parametrize(
    "descriptor",
    [
        _zero(2 * MIB + 512, PAGE),
        _zero(2 * MIB, 100),
        _zero(1 << 60, PAGE),
        _zero(2 * MIB, 1 << 62),
        _zero(0, PAGE),
        _zero(64 << 10, 1 << 20),
        _zero(MIB, PAGE),
        _zero(192 << 10, MIB),
        _zero(2 * MIB - PAGE, PAGE),
    ],
)
async def test_places_that_the_log_may_not_change(descriptor: bytes) -> None:
    reader = _log((0, _crafted([descriptor], 0)))
    sequence = await reader.active_sequence()
    assert len(sequence) == 1
    with pytest.raises(CorruptImageError, match="log FileOffset"):
        await reader.changes(sequence)


async def test_more_than_memory_should_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_REPLAY", 3 * PAGE)
    reader = _log((0, _entry(3, 1, 0)))
    with pytest.raises(UnsupportedImageError, match="log entries"):
        await reader.changes(await reader.active_sequence())


@pytest.mark.parametrize("guid", [GUID, UUID(int=1)])
async def test_entries_that_claim_each_others_pages(guid: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is read as a part of two of them."""
    entry = _entry(60, 5, 0)
    head = bytearray(_entry(1, 5, 0)[:PAGE])
    struct.pack_into("<II", head, 8, MIB, 0)
    struct.pack_into("<I", head, 24, 3000)
    heads = [(at, bytes(head)) for at in range(0, MIB // 2, PAGE)]
    other = bytearray(head)
    other[32:48] = guid.bytes_le
    reader = _log(*heads, (MIB // 2, bytes(other)), (MIB - len(entry), entry))
    lengths = []
    read = MemoryStorage.read

    async def counted(self: MemoryStorage, offset: int, length: int) -> bytearray:
        lengths.append(length)
        return await read(self, offset, length)

    monkeypatch.setattr(MemoryStorage, "read", counted)
    assert await _numbers(reader) == []
    assert sum(lengths) < 3 * MIB


@needs_qemu
async def test_the_log_that_qemu_leaves(tmp_path: Path) -> None:
    """It is empty after each change, but what it held can be read with the number it had."""
    path = qemu_image(tmp_path / "a.vhdx", 20 * MIB, "block_size=1M")
    images.qemu_io(path, "vhdx", ["write -P 1 5M 64k"])
    data = path.read_bytes()
    guid = UUID(bytes_le=data[MIB + 32 : MIB + 48])
    storage = MemoryStorage(data)
    reader = LogReader(storage, HEADER.next(log_guid=guid))
    sequence = await reader.active_sequence()
    assert len(sequence) == 1
    (change,) = await reader.changes(sequence)
    assert change.offset == 2 * MIB
    assert change.data == data[2 * MIB : 2 * MIB + PAGE]
