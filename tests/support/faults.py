"""A storage that fails: at the n-th operation, once or from then on, after doing a part of the work."""

from __future__ import annotations

import os
import random

from nbdserve.storage.base import ReadBuffer
from nbdserve.units import SECTOR_SIZE
from tests.support.recording import ByteStorage


class Faults:
    """When to fail; common to the storages of one image, which count their operations together."""

    def __init__(
        self, at: int, errno: int, *, forever: bool = False, seed: int = 0, kinds: frozenset[str] | None = None
    ) -> None:
        """The operation number ``at`` (from 0) of ``kinds`` (None: all but reads) fails with ``errno``."""
        self.at = at
        self.errno = errno
        self.forever = forever
        self.kinds = kinds or frozenset({"write", "zero", "discard", "truncate", "flush"})
        self.rng = random.Random(seed)
        self.count = 0
        self.fired = 0
        self.armed = True

    def strikes(self, kind: str) -> bool:
        """Count an operation of ``kind``; whether it is to fail."""
        if not self.armed or kind not in self.kinds:
            return False
        self.count += 1
        hit = self.count - 1 == self.at or (self.forever and self.count - 1 > self.at)
        self.fired += hit
        return hit

    def error(self) -> OSError:
        """What the failing operation raises."""
        return OSError(self.errno, os.strerror(self.errno) + " (injected)")


class FaultyStorage(ByteStorage):
    """A ByteStorage that fails as its Faults say. After a failed flush it fails for good, as the contract has it."""

    def __init__(self, content: bytes | bytearray, faults: Faults, path: str = "faulty") -> None:
        super().__init__(bytearray(content), path)
        self.faults = faults
        self.dead: OSError | None = None

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return "read" not in self.faults.kinds and super().try_read_into(offset, buffer)

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        if self.dead or self.faults.rng.random() < 0.5:
            return False
        return super().try_write(offset, data)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.faults.strikes("read"):
            buffer[: len(buffer) // 2] = b"\xdb" * (len(buffer) // 2)
            raise self.faults.error()
        await super().read_into(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._refuse_dead()
        if self.faults.strikes("write"):
            stop = offset + self.faults.rng.randrange(len(data) + 1)
            done = max(0, stop - stop % SECTOR_SIZE - offset)
            if done:
                await super().write(offset, memoryview(data)[:done])
            raise self.faults.error()
        await super().write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        self._refuse_dead()
        if self.faults.strikes("zero"):
            raise self.faults.error()
        await super().zero(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        self._refuse_dead()
        if self.faults.strikes("discard"):
            raise self.faults.error()

    async def truncate(self, size: int) -> None:
        self._refuse_dead()
        if self.faults.strikes("truncate"):
            raise self.faults.error()
        await super().truncate(size)

    async def extend(self, size: int) -> None:
        self._refuse_dead()
        if self.faults.strikes("truncate"):
            raise self.faults.error()
        await super().extend(size)

    async def flush(self) -> None:
        self._refuse_dead()
        if self.faults.strikes("flush"):
            self.dead = self.faults.error()
            raise self.dead

    def _refuse_dead(self) -> None:
        if self.dead is not None:
            raise OSError(self.dead.errno, self.dead.strerror)
