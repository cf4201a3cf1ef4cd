"""When writeback is begun."""

from __future__ import annotations

from nbdserve.block.writeback import Writeback
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB


class Begun(MemoryStorage):
    times = 0

    def begin_writeback(self) -> None:
        self.times += 1


def test_after_sixteen_small_allocations_or_a_mebibyte() -> None:
    storage = Begun()
    writeback = Writeback(storage)
    for length, count in ((4 * KIB, 16), (64 * KIB, 16), (256 * KIB, 4), (2 * MIB, 1)):
        before = storage.times
        for _ in range(count - 1):
            writeback.allocated(length)
        assert storage.times == before
        writeback.allocated(length)
        assert storage.times == before + 1
