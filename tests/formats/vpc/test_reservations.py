"""Table entries are stable before anybody gets the place, and those in one barrier share it."""

from __future__ import annotations

import asyncio
import errno

import numpy as np
import pytest

from nbdserve.formats.tables import Table
from nbdserve.formats.vpc.layout import UNUSED
from nbdserve.formats.vpc.reservations import Reservations
from nbdserve.formats.vpc.space import BlockSpace
from tests.support.recording import Barrier, ByteStorage, Change, Recorder

TABLE_AT = 1536
COUNT = 300
END = 4096
FOOTER = b"conectix" + bytes(504)


class Rig:
    """A table of 300 blocks, none of them there."""

    def __init__(self, storage: ByteStorage) -> None:
        self.storage = storage
        self.table = Table(TABLE_AT, np.full(COUNT, UNUSED, np.uint32), ">u4")
        self.space = BlockSpace(storage, FOOTER, END, block_size=4096, bitmap_size=512)
        self.begun: list[dict[int, int]] = []
        self.fail = False
        self.reservations = Reservations(storage, self.table, self.space, self._begin)

    async def _begin(self, places: dict[int, int]) -> None:
        if self.fail:
            raise OSError(errno.EIO, "begin")
        self.begun.append(dict(places))

    def on_disk(self) -> list[int]:
        return np.frombuffer(self.storage.content[TABLE_AT : TABLE_AT + COUNT * 4], ">u4").tolist()


def content() -> bytes:
    return bytes(TABLE_AT) + b"\xff" * (END - TABLE_AT) + FOOTER


async def test_reserve_take_publish() -> None:
    rig = Rig(ByteStorage(content()))
    reservations = rig.reservations
    assert reservations.take(5) is None
    await reservations.reserve([5])
    assert rig.table.entries[5] == UNUSED
    assert rig.on_disk()[5] == END // 512
    assert reservations.take(5) == END
    assert reservations.take(5) is None
    reservations.publish(5)
    assert rig.table.entries[5] == END // 512
    assert reservations.shown == {}
    await reservations.reserve([5])
    assert len(rig.begun) == 1


async def test_entries_in_one_sector_do_not_undo_each_other() -> None:
    rig = Rig(ByteStorage(content()))
    for index in (3, 200, 4, 201, 5):
        await rig.reservations.reserve([index])
    assert [index for index, entry in enumerate(rig.on_disk()) if entry != UNUSED] == [3, 4, 5, 200, 201]


async def test_the_entry_is_stable_before_the_place_is_given() -> None:
    recorder = Recorder(jitter=0)
    rig = Rig(recorder.storage(content()))
    await rig.reservations.reserve([7])
    writes = [entry for entry in recorder.log if isinstance(entry, Change) and entry.offset < END]
    assert len(writes) == 1
    later = recorder.log[recorder.log.index(writes[0]) + 1 :]
    assert any(isinstance(entry, Barrier) for entry in later)
    before = recorder.log[: recorder.log.index(writes[0])]
    assert isinstance(before[-1], Barrier), "the place is ready, and stable, before the entry shows it"


async def test_who_waits_shares_the_next_barrier() -> None:
    recorder = Recorder(jitter=0)
    rig = Rig(recorder.storage(content()))
    await asyncio.gather(*(rig.reservations.reserve([index]) for index in range(20)))
    assert sum(len(places) for places in rig.begun) == 20
    assert len(rig.begun) <= 2
    assert all(rig.reservations.take(index) is not None for index in range(20))


async def test_two_want_the_same_block() -> None:
    rig = Rig(ByteStorage(content()))
    await asyncio.gather(rig.reservations.reserve([1]), rig.reservations.reserve([1]), rig.reservations.reserve([1]))
    assert rig.begun == [{1: END}]


async def test_a_long_range_is_reserved_in_parts() -> None:
    rig = Rig(ByteStorage(content()))
    await rig.reservations.reserve(range(COUNT))
    assert rig.on_disk().count(UNUSED) == COUNT - 256


async def test_a_place_is_not_used_twice_after_a_failure() -> None:
    rig = Rig(ByteStorage(content()))
    rig.fail = True
    with pytest.raises(OSError, match="begin"):
        await rig.reservations.reserve([1])
    assert rig.reservations.take(1) is None
    rig.fail = False
    await rig.reservations.reserve([1])
    assert rig.reservations.take(1) == END + 4608
    assert rig.on_disk()[1] == (END + 4608) // 512


async def test_what_was_taken_and_not_published_is_replaced() -> None:
    rig = Rig(ByteStorage(content()))
    await rig.reservations.reserve([1])
    first = rig.reservations.take(1)
    await rig.reservations.reserve([1])
    second = rig.reservations.take(1)
    assert first != second
    rig.reservations.publish(1)
    assert rig.table.entries[1] * 512 == second


async def test_what_was_given_back_is_zeroes_again() -> None:
    rig = Rig(ByteStorage(content()))
    await rig.reservations.reserve([1])
    place = rig.reservations.take(1)
    assert place is not None
    await rig.storage.write(place + 1000, b"J" * 3000)
    rig.reservations.give_back(1)
    assert rig.reservations.take(1) is None
    await rig.reservations.reserve([1, 2])
    assert rig.reservations.take(1) == place
    assert rig.reservations.take(2) == place + 4608
    assert b"J" not in rig.storage.content


async def test_withdraw() -> None:
    rig = Rig(ByteStorage(content()))
    await rig.reservations.reserve([1, 2, 250])
    rig.reservations.take(1)
    rig.reservations.take(2)
    rig.reservations.publish(2)
    await rig.reservations.settle()
    await rig.reservations.withdraw()
    assert rig.on_disk() == rig.table.words.tolist()
    assert rig.reservations.take(250) is None
    assert rig.reservations.shown == {}
