"""Reading the header of an image, and changing it."""

from __future__ import annotations

import asyncio

from nbdserve.formats.raw_cow.layout import CHANGING_AT, HEADER, HEADER_SIZE, Header, is_sealed, with_checksum
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE


async def read_header(storage: Storage, *, any_checksum: bool = False) -> tuple[Header, bytes]:
    """The header of the image on ``storage``, and its bytes. ImageError as for ``Header.parse``."""
    data = bytes(await storage.read(0, HEADER_SIZE))
    return Header.parse(data, storage.path, storage.size, any_checksum=any_checksum), data


class HeaderSector:
    """The sector with the fields that change, written alone: a disk does not tear 512 bytes."""

    def __init__(self, storage: Storage, header: bytes) -> None:
        self._storage = storage
        self._header = header
        self._lock = asyncio.Lock()

    @property
    def is_sealed(self) -> bool:
        """The checksum is right; ``patch`` makes it so."""
        return is_sealed(self._header)

    async def patch(self, **values: int) -> None:
        """Change fields, named as in the layout, durably; everything else of the header stays as it is."""
        async with self._lock:
            fields = HEADER.parse(self._header) | values
            changed = with_checksum(HEADER.build(fields) + self._header[HEADER.sizeof() :])
            end = CHANGING_AT + SECTOR_SIZE
            assert changed[:CHANGING_AT] == self._header[:CHANGING_AT]
            assert changed[end:] == self._header[end:]
            await self._storage.write_stable([(CHANGING_AT, changed[CHANGING_AT:end])])
            self._header = changed

    async def replace(self, header: Header) -> None:
        """Write all of ``header``, durably. A crash meanwhile may leave a checksum that is wrong."""
        async with self._lock:
            changed = header.build()
            await self._storage.write_stable([(0, changed)])
            self._header = changed
