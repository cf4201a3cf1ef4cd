"""Giving a range of a storage disk space before there is anything in it: ``preallocation`` of every format."""

from __future__ import annotations

from typing import Final

from nbdserve.storage.base import Storage
from nbdserve.units import MIB

_CHUNK: Final = bytes(MIB)


async def reserve(storage: Storage, offset: int, length: int, mode: str) -> None:
    """The range reads as zeroes, and with ``falloc`` has disk space, with ``full`` by writing zeroes to it.

    Other modes do nothing, so that the caller must know that the range reads as zeroes.
    """
    if length and mode == "falloc":
        await storage.zero(offset, length, unmap=False)
    elif mode == "full":
        for position in range(offset, offset + length, len(_CHUNK)):
            await storage.write(position, _CHUNK[: offset + length - position])
