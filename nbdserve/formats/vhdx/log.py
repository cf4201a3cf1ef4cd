"""The log: a ring of entries, each of which is a set of 4 KiB pages to be written ([MS-VHDX] 2.3).

Changes of metadata are in an entry before they are in their place, so that a crash between the pages of one change
leaves no half of it: whoever opens the image next writes the pages of the *active sequence* again. Sequences are told
by the numbers of their entries, and entries of another life of the log by the GUID.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import construct as c
import numpy as np

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.extents import ZERO
from nbdserve.formats.tables import Piece
from nbdserve.formats.vhdx.layout import NO_GUID, REGION_TABLE_OFFSETS, Header, is_sealed, sealed
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, div_ceil

PAGE: Final = 4096
"""The unit of the log: of entries, of what they change, and of where."""
ENTRY_SIGNATURE: Final = b"loge"
ZERO_SIGNATURE: Final = b"zero"
DATA_SIGNATURE: Final = b"desc"
SECTOR_SIGNATURE: Final = b"data"

ENTRY_HEAD: Final[Any] = c.Struct(
    "signature" / c.Bytes(4),
    "checksum" / c.Int32ul,
    "entry_length" / c.Int32ul,
    "tail" / c.Int32ul,
    "sequence_number" / c.Int64ul,
    "descriptor_count" / c.Int32ul,
    "reserved" / c.Int32ul,
    "log_guid" / c.Bytes(16),
    "flushed_file_offset" / c.Int64ul,
    "last_file_offset" / c.Int64ul,
)
ZERO_DESCRIPTOR: Final = struct.Struct("<4sIQQQ")
"""Signature, reserved, ZeroLength, FileOffset, SequenceNumber."""
DATA_DESCRIPTOR: Final = struct.Struct("<4s4s8sQQ")
"""Signature, TrailingBytes, LeadingBytes, FileOffset, SequenceNumber: 12 bytes that the data sector has no room for."""
DATA_SECTOR: Final = struct.Struct("<4sI4084sI")
"""Signature, SequenceHigh, bytes 8 to 4091 of the page, SequenceLow."""
DESCRIPTOR_LENGTH: Final = 32
_HEAD_LENGTH: Final = 64

MAX_ENTRY: Final = 8 * MIB
MAX_REPLAY: Final = 32 * MIB
"""Bytes of changes that are held in memory to be replayed. Writers clear their log long before: it is 1 MiB mostly."""
MAX_ENTRIES: Final = 1 << 16
_MAX_FILE_OFFSET: Final = 1 << 57
_SCAN_BYTES: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class Entry:
    """A log entry that is valid by itself."""

    position: int
    """Bytes from the start of the log."""
    length: int
    tail: int
    """The position of the oldest entry that may not be in its place yet when this one was written."""
    sequence_number: int
    flushed_file_offset: int
    """The file is at least that long, or it has been truncated since."""
    last_file_offset: int
    """The length the file has to have when this entry is in its place."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a descriptor says: ``data`` (4 KiB), or zeroes where it is None."""

    offset: int
    length: int
    data: bytes | None


def build_entry(
    pages: Sequence[Piece], *, sequence_number: int, tail: int, log_guid: UUID, flushed: int, last: int
) -> bytes:
    """The bytes of an entry that writes ``pages``, 4 KiB each."""
    descriptors, sectors = [], []
    for offset, page in pages:
        data = bytes(page)
        assert len(data) == PAGE
        descriptors.append(DATA_DESCRIPTOR.pack(DATA_SIGNATURE, data[-4:], data[:8], offset, sequence_number))
        sectors.append(
            DATA_SECTOR.pack(SECTOR_SIGNATURE, sequence_number >> 32, data[8:-4], sequence_number & 0xFFFF_FFFF)
        )
    length = entry_length(len(pages))
    head: bytes = ENTRY_HEAD.build(
        {
            "signature": ENTRY_SIGNATURE,
            "checksum": 0,
            "entry_length": length,
            "tail": tail,
            "sequence_number": sequence_number,
            "descriptor_count": len(pages),
            "reserved": 0,
            "log_guid": log_guid.bytes_le,
            "flushed_file_offset": flushed,
            "last_file_offset": last,
        }
    )
    described = head + b"".join(descriptors)
    return sealed(described.ljust(length - len(pages) * PAGE, b"\0") + b"".join(sectors))


def descriptor_pages(count: int) -> int:
    """Pages that the head of an entry and ``count`` descriptors take."""
    return div_ceil(_HEAD_LENGTH + count * DESCRIPTOR_LENGTH, PAGE)


def entry_length(pages: int) -> int:
    """Bytes of an entry that writes ``pages`` pages."""
    return (descriptor_pages(pages) + pages) * PAGE


def pages_that_fit(length: int) -> int:
    """The most pages an entry of at most ``length`` bytes can write."""
    count = length // PAGE
    while count > 0 and entry_length(count) > length:
        count -= 1
    return count


class LogReader:
    """The log of one image."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._offset = header.log_offset
        self._length = header.log_length
        self._guid = header.log_guid
        self._path = storage.path

    async def active_sequence(self) -> list[Entry]:
        """The entries that are to be replayed, oldest first; none when the log is empty.

        CorruptImageError when the file is shorter than it was when they were written.
        """
        if self._guid == NO_GUID:
            return []
        entries: dict[int, Entry] = {}
        marks, candidates = await self._candidates()
        for position in candidates:
            after = bisect_right(marks, position)
            following = marks[after] if after < len(marks) else marks[0] + self._length
            entry = await self._read_entry(position, following - position)
            if entry is not None:
                entries[position] = entry
        sequence = _newest_sequence(entries, self._length)
        if sequence and sequence[-1].flushed_file_offset > self._storage.size:
            raise CorruptImageError(
                self._path,
                f"the file has only {self._storage.size} bytes, it was truncated",
                field="FlushedFileOffset",
                value=sequence[-1].flushed_file_offset,
            )
        return sequence

    async def changes(self, sequence: Sequence[Entry]) -> list[Change]:
        """What the entries write, in order. UnsupportedImageError when it is too much."""
        result: list[Change] = []
        size = 0
        for entry in sequence:
            size += entry.length
            if size > MAX_REPLAY:
                raise UnsupportedImageError(
                    self._path, f"more than {MAX_REPLAY} bytes are to be replayed", field="log entries", value=size
                )
            result += self._decode(await self._read(entry.position, entry.length))
        return result

    async def _candidates(self) -> tuple[list[int], list[int]]:
        """Positions with an entry's signature, and those of them with this log's GUID. Holes are skipped."""
        marks: set[int] = set()
        found: set[int] = set()
        end = self._offset + self._length
        at = self._offset
        while at < end:
            runs = await self._storage.host_map(at, min(end - at, 1 << 40))
            for start, length, kind in zip(runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True):
                if kind != ZERO:
                    first = start - (start - self._offset) % PAGE
                    await self._scan(first, start + length, marks, found)
            at = int(runs.start[-1] + runs.length[-1])
        if len(found) > MAX_ENTRIES:
            raise UnsupportedImageError(self._path, f"at most {MAX_ENTRIES}", field="log entries", value=len(found))
        return sorted(marks), sorted(found)

    async def _scan(self, start: int, end: int, marks: set[int], found: set[int]) -> None:
        for at in range(start, end, _SCAN_BYTES):
            length = min(_SCAN_BYTES, self._offset + self._length - at, div_ceil(end - at, PAGE) * PAGE)
            pages = np.frombuffer(await self._storage.read(at, length), np.uint8).reshape(-1, PAGE)
            hits = (pages[:, :4] == np.frombuffer(ENTRY_SIGNATURE, np.uint8)).all(axis=1)
            marks.update((at - self._offset + np.flatnonzero(hits) * PAGE).tolist())
            hits &= (pages[:, 32:48] == np.frombuffer(self._guid.bytes_le, np.uint8)).all(axis=1)
            found.update((at - self._offset + np.flatnonzero(hits) * PAGE).tolist())

    async def _read(self, position: int, length: int) -> bytes:
        """A range of the ring."""
        first = min(length, self._length - position)
        data = bytes(await self._storage.read(self._offset + position, first))
        return data + bytes(await self._storage.read(self._offset, length - first)) if first < length else data

    async def _read_entry(self, position: int, room: int) -> Entry | None:
        """The entry at ``position``; None when it is not valid.

        ``room``: the bytes up to the next page that begins like an entry, which no page inside of one does. So no page
        is read, and summed, as a part of two entries, whatever their lengths say.
        """
        head = ENTRY_HEAD.parse(await self._read(position, _HEAD_LENGTH))
        count, length = head.descriptor_count, head.entry_length
        if (
            not head.sequence_number
            or not 0 < length <= min(room, self._length, MAX_ENTRY)
            or length % PAGE
            or head.tail % PAGE
            or head.tail >= self._length
            or descriptor_pages(count) * PAGE > length
        ):
            return None
        if head.last_file_offset > _MAX_FILE_OFFSET or head.flushed_file_offset > _MAX_FILE_OFFSET:
            return None
        data = await self._read(position, length)
        if not _is_well_formed(data, count, head.sequence_number) or not is_sealed(data):
            return None
        return Entry(
            position,
            length,
            head.tail,
            head.sequence_number,
            head.flushed_file_offset,
            head.last_file_offset,
        )

    def _decode(self, data: bytes) -> Iterator[Change]:
        count = ENTRY_HEAD.parse(data).descriptor_count
        sector = descriptor_pages(count) * PAGE
        for at in range(_HEAD_LENGTH, _HEAD_LENGTH + count * DESCRIPTOR_LENGTH, DESCRIPTOR_LENGTH):
            if data[at : at + 4] == ZERO_SIGNATURE:
                _, _, length, offset, _ = ZERO_DESCRIPTOR.unpack_from(data, at)
                self._check_place(offset, length)
                yield Change(offset, length, None)
                continue
            _, trailing, leading, offset, _ = DATA_DESCRIPTOR.unpack_from(data, at)
            self._check_place(offset, PAGE)
            yield Change(offset, PAGE, leading + data[sector + 8 : sector + PAGE - 4] + trailing)
            sector += PAGE

    def _check_place(self, offset: int, length: int) -> None:
        """Neither the headers nor the log itself are changed by way of the log."""
        end = offset + length
        if offset % PAGE or length % PAGE or end > _MAX_FILE_OFFSET:
            raise CorruptImageError(self._path, "no page of a file", field="log FileOffset", value=offset)
        if offset < REGION_TABLE_OFFSETS[0] or (offset < self._offset + self._length and end > self._offset):
            raise CorruptImageError(
                self._path, "the log may not change the headers, or itself", field="log FileOffset", value=offset
            )


def _is_well_formed(data: bytes, count: int, sequence_number: int) -> bool:
    """Whether the descriptors and data sectors of an entry are those it should have."""
    sector = descriptor_pages(count) * PAGE
    for at in range(_HEAD_LENGTH, _HEAD_LENGTH + count * DESCRIPTOR_LENGTH, DESCRIPTOR_LENGTH):
        signature, _, _, _, number = DATA_DESCRIPTOR.unpack_from(data, at)
        if number != sequence_number:
            return False
        if signature == ZERO_SIGNATURE:
            continue
        if signature != DATA_SIGNATURE or sector + PAGE > len(data):
            return False
        mark, high, _, low = DATA_SECTOR.unpack_from(data, sector)
        if mark != SECTOR_SIGNATURE or (high << 32 | low) != sequence_number:
            return False
        sector += PAGE
    return sector == len(data)


def _newest_sequence(entries: dict[int, Entry], log_length: int) -> list[Entry]:
    """The sequence with the greatest numbers: from the tail that its newest entry names up to that entry.

    An entry whose tail is not there, or not connected to it, heads no sequence: then an older one is the newest.
    """
    steps = 4 * MAX_ENTRIES
    for head in sorted(entries.values(), key=lambda entry: entry.sequence_number, reverse=True):
        sequence: list[Entry] = []
        entry = entries.get(head.tail)
        while entry is not None and entry.sequence_number <= head.sequence_number and steps > 0:
            steps -= 1
            sequence.append(entry)
            if entry is head:
                return sequence
            following = entries.get((entry.position + entry.length) % log_length)
            connected = following is not None and following.sequence_number == entry.sequence_number + 1
            entry = following if connected else None
    return []
