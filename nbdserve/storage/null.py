"""Storage that keeps nothing (QEMU's ``null-co``): it reads as zeroes, and what is written is gone. For tests and
measurements, and as the target of a job whose copy nobody wants."""

from __future__ import annotations

from nbdserve.buffers import fill_zeroes
from nbdserve.extents import ZERO, RunArray
from nbdserve.storage.base import ReadBuffer, Storage


class NullStorage(Storage):
    """``size`` bytes of nothing. Every attempt succeeds without blocking."""

    def __init__(self, size: int, *, read_only: bool = False, path: str = "null-co://") -> None:
        self.path = path
        self.read_only = read_only
        self.size = size

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        fill_zeroes(buffer)
        return True

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        fill_zeroes(buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        """Forgotten."""

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        """It is."""

    async def discard(self, offset: int, length: int) -> None:
        """There is nothing."""

    async def flush(self) -> None:
        """Nothing can be lost."""

    async def truncate(self, size: int) -> None:
        self.size = size

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        return RunArray.of(offset, length, ZERO)

    def allocated_size(self) -> int:
        return 0

    async def close(self) -> None:
        """Nothing is held."""
