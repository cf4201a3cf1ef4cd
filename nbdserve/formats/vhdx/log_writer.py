"""Changes of tables reach the disk through the log, in an order that every crash survives ([MS-VHDX] 2.3)."""

from __future__ import annotations

from typing import Final
from uuid import uuid4

from nbdserve.formats.tables import Piece
from nbdserve.formats.vhdx.layout import NO_GUID
from nbdserve.formats.vhdx.log import PAGE, build_entry, entry_length, pages_that_fit
from nbdserve.formats.vhdx.structure import HeaderWriter
from nbdserve.storage.base import Storage

_LONGEST_ENTRY: Final = 1 << 20


class LogWriter:
    """The log of an image that is open for writing. It begins empty, with an identity of its own."""

    def __init__(self, storage: Storage, headers: HeaderWriter) -> None:
        self.stable_size = storage.size
        """A length the file is known to have for good, bytes. Writes under way may have moved its end further up."""
        self.end = storage.size
        """Length the file must have for the blocks that the pages show."""
        self._storage = storage
        self._headers = headers
        self._offset = headers.header.log_offset
        self._length = headers.header.log_length
        # A third of the log: wherever the last entry is, the next one has room apart from it, in one piece.
        self._pages_per_entry = pages_that_fit(min(_LONGEST_ENTRY, self._length // 3 // PAGE * PAGE))
        self._guid = uuid4()
        self._position = 0
        self._sequence_number = 0

    @property
    def _in_use(self) -> bool:
        return self._headers.header.log_guid != NO_GUID

    async def barrier_log(self, pages: list[Piece]) -> None:
        """Changes of tables (4 KiB pages) are stable in the log before they are written to their places.

        What earlier entries wrote to its place is stable by now (the flush of the guest data covers it), so every
        entry is its own tail: it alone is to be replayed, and the entry before it stays whole until this one is.

        Crash before the entry is stable: its checksum does not fit, and the entry before it is replayed, to no effect,
        for its pages are in their places and nothing has changed them. Crash after: the pages are written again. They
        show blocks whose content is stable, in a file that replaying extends to its length. When there are several
        entries, each is complete by itself, and what shows something comes after what it shows.

        The file is made as long as the entries promise before the first of them, whose flush makes that stable, too: a
        write under way may have moved the end there already, which no flush covers yet. Without it a crash could leave
        a file that ends inside a block an entry shows.

        The first entry is stable before a header names the log: a log that is named always has an entry.
        """
        if self.end > self.stable_size:
            await self._storage.extend(self.end)
        for first in range(0, len(pages), self._pages_per_entry):
            if first:
                await self._storage.flush()
            await self._write_entry(pages[first : first + self._pages_per_entry])

    async def _write_entry(self, pages: list[Piece]) -> None:
        length = entry_length(len(pages))
        if self._position + length > self._length:
            self._position = 0
        self._sequence_number += 1
        entry = build_entry(
            pages,
            sequence_number=self._sequence_number,
            tail=self._position,
            log_guid=self._guid,
            flushed=self.stable_size,
            last=self.end,
        )
        await self._storage.write_stable([(self._offset + self._position, entry)])
        self.stable_size = max(self.stable_size, self.end)
        self._position += length
        if not self._in_use:
            await self._headers.update(log_guid=self._guid)
        await self._storage.write_all(pages)

    async def close(self) -> None:
        """Empty the log: what it holds is in its place for good.

        Crash before a header says so: the last entry is replayed, to no effect.
        """
        if self._in_use:
            await self._storage.flush()
            await self._headers.update(log_guid=NO_GUID)
