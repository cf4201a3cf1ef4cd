"""What the log holds after each change, and when."""

from __future__ import annotations

import random
from uuid import uuid4

from nbdserve.formats.tables import Piece
from nbdserve.formats.vhdx.layout import NO_GUID, Header
from nbdserve.formats.vhdx.log import ENTRY_HEAD, PAGE, LogReader
from nbdserve.formats.vhdx.log_writer import LogWriter
from nbdserve.formats.vhdx.structure import HeaderWriter
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB
from tests.formats.vhdx.helpers import stored


class _Journal(MemoryStorage):
    """A storage that remembers what was written, and between which flushes."""

    def __init__(self) -> None:
        super().__init__(size=16 * MIB)
        self.epochs: list[list[tuple[int, int]]] = [[]]

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self.epochs[-1].append((offset, len(data)))
        await super().write(offset, data)

    async def flush(self) -> None:
        if self.epochs[-1]:
            self.epochs.append([])


def _writer(storage: MemoryStorage) -> tuple[LogWriter, HeaderWriter]:
    headers = HeaderWriter(storage, Header(1, uuid4(), uuid4(), NO_GUID, MIB, MIB), 0)
    return LogWriter(storage, headers), headers


def _pages(rng: random.Random, count: int) -> list[Piece]:
    return [(4 * MIB + number * PAGE, rng.randbytes(PAGE)) for number in rng.sample(range(1000), count)]


async def test_the_order_of_the_first_change_and_of_the_next() -> None:
    storage = _Journal()
    writer, headers = _writer(storage)
    rng = random.Random(1)
    pages = _pages(rng, 2)
    await writer.barrier_log(pages)
    assert storage.epochs == [
        [(MIB, 3 * PAGE)],
        [(128 << 10, PAGE)],
        [(64 << 10, PAGE)],
        [(offset, PAGE) for offset, _ in pages],
    ]
    await storage.flush()
    storage.epochs = [[]]
    await writer.barrier_log(pages[:1])
    assert storage.epochs == [[(MIB + 3 * PAGE, 2 * PAGE)], [(pages[0][0], PAGE)]]
    storage.epochs = [[]]
    await writer.close()
    assert headers.header.log_guid == NO_GUID
    assert [epoch[0][0] for epoch in storage.epochs[:2]] == [128 << 10, 64 << 10]


async def test_an_empty_log_is_not_closed_by_writing() -> None:
    storage = _Journal()
    writer, _ = _writer(storage)
    await writer.close()
    assert storage.epochs == [[]]


async def test_the_newest_entry_and_the_one_before_are_whole_at_any_time() -> None:
    """For as many changes of any length as fill the ring several times."""
    storage = MemoryStorage(size=16 * MIB)
    writer, headers = _writer(storage)
    rng = random.Random(5)
    before: list[Piece] = []
    positions = set()
    for number in range(60):
        pages = _pages(rng, rng.choice((1, 2, 40, 80)))
        await writer.barrier_log(pages)
        reader = LogReader(storage, headers.header)
        sequence = await reader.active_sequence()
        assert [entry.sequence_number for entry in sequence] == [number + 1]
        positions.add(sequence[0].position)
        assert [(change.offset, change.data) for change in await reader.changes(sequence)] == pages
        if before:
            torn = MIB + sequence[0].position
            head = await storage.read(torn, PAGE)
            await storage.write(torn, bytes(PAGE))
            sequence = await reader.active_sequence()
            assert [entry.sequence_number for entry in sequence] == [number]
            assert [(change.offset, change.data) for change in await reader.changes(sequence)] == before
            await storage.write(torn, head)
        before = pages
    assert 0 in positions
    assert len(positions) > 10


async def test_more_pages_than_one_entry_has() -> None:
    storage = _Journal()
    writer, headers = _writer(storage)
    pages = _pages(random.Random(2), 200)
    await writer.barrier_log(pages)
    for offset, page in pages:
        assert await storage.read(offset, PAGE) == page
    entries = [length for epoch in storage.epochs for offset, length in epoch if MIB <= offset < 2 * MIB]
    assert len(entries) == 3
    assert all(length <= MIB // 3 for length in entries)
    (last,) = await LogReader(storage, headers.header).active_sequence()
    assert last.sequence_number == 3
    # Each entry is stable, and the pages of the one before it, when the next one begins.
    for epoch in storage.epochs:
        in_log = [offset for offset, _ in epoch if offset < 4 * MIB]
        assert not in_log or len(epoch) == 1


async def test_the_file_has_its_length_when_the_log_shows_blocks() -> None:
    storage = MemoryStorage(size=16 * MIB)
    writer, headers = _writer(storage)
    writer.stable_size, writer.end = 16 * MIB, 20 * MIB
    await writer.barrier_log(_pages(random.Random(2), 1))
    assert storage.size == 20 * MIB
    (entry,) = await LogReader(storage, headers.header).active_sequence()
    assert (entry.flushed_file_offset, entry.last_file_offset) == (16 * MIB, 20 * MIB)
    assert len(stored(storage)) == 20 * MIB


async def test_a_commit_cuts_nothing_off_that_is_written_meanwhile() -> None:
    class Growing(MemoryStorage):
        async def extend(self, size: int) -> None:
            await self.write(size, b"new")  # arrives before the file is extended
            await super().extend(size)

    storage = Growing(size=4 * MIB)
    writer, _ = _writer(storage)
    writer.end = 8 * MIB
    await writer.barrier_log([(3 * MIB, bytes(PAGE))])
    assert await storage.read(8 * MIB, 3) == b"new"


async def test_the_length_an_entry_promises_is_stable_with_it() -> None:
    class Told(_Journal):
        async def extend(self, size: int) -> None:
            self.epochs[-1].append((size, 0))
            await super().extend(size)

    storage = Told()
    writer, _ = _writer(storage)
    writer.stable_size, writer.end = 8 * MIB, storage.size  # a write under way has moved the end
    await writer.barrier_log(_pages(random.Random(3), 1))
    assert storage.epochs[0] == [(storage.size, 0), (MIB, 2 * PAGE)]
    assert writer.stable_size == storage.size
    entry = ENTRY_HEAD.parse(await storage.read(MIB, 64))
    assert (entry.flushed_file_offset, entry.last_file_offset) == (8 * MIB, storage.size)
