"""Which units are handed out, when a freed one comes back, and what is known to read as zeroes."""

from __future__ import annotations

import errno

import pytest

from nbdserve.formats.append_space import UNBOUNDED, AppendSpace
from nbdserve.storage.memory import MemoryStorage


def _space(size: int = 1000, unit: int = 100, end: int = 1000, **how: int) -> AppendSpace:
    return AppendSpace(MemoryStorage(size=size), unit, end, **how)


async def _release(space: AppendSpace) -> None:
    await space.release(space.collect())


def test_new_units_follow_each_other_and_are_zeroed() -> None:
    space = _space()
    assert space.take() == (1000, 1, True)
    assert space.take(3) == (1100, 3, True)
    assert space.take_whole(2) == (1400, True)
    assert space.end == 1600


@pytest.mark.parametrize(("size", "zeroed_from"), [(999, 1000), (1000, 1000), (1001, 1100), (1250, 1300)])
def test_what_lies_past_the_end_at_first_is_junk(size: int, zeroed_from: int) -> None:
    space = _space(size)
    for _ in range(4):
        host_offset, _, zeroed = space.take()
        assert zeroed == (host_offset >= zeroed_from)


def test_several_units_of_which_one_is_junk_are_not_zeroed() -> None:
    assert _space(1001).take(5) == (1000, 5, False)


def test_a_storage_that_does_not_grow_zeroed_has_junk_everywhere() -> None:
    storage = MemoryStorage(size=1000)
    storage.grows_zeroed = False
    space = AppendSpace(storage, 100, 1000)
    assert [space.take()[2] for _ in range(3)] == [False] * 3


async def test_a_freed_unit_is_handed_out_only_after_its_release() -> None:
    space = _space()
    space.take(3)
    space.free(1000)
    assert space.take() == (1300, 1, True)
    ranges = space.collect()
    assert ranges == [(1000, 100)] and space.collect() == []
    assert space.take() == (1400, 1, True)
    await space.release(ranges)
    assert space.take() == (1000, 1, False)
    assert space.take() == (1500, 1, True)


async def test_a_failed_commit_keeps_units_in_quarantine() -> None:
    space = _space()
    space.take(3)
    space.free(1000, 2)
    ranges = space.collect()
    space.free(1200)
    space.restore(ranges)
    assert sorted(space.collect()) == [(1000, 200), (1200, 100)]


async def test_free_units_join_and_the_lowest_go_first() -> None:
    space = _space()
    space.take(10)
    for host_offset in (1700, 1200, 1300, 1100):
        space.free(host_offset)
    await _release(space)
    assert space.free_ranges == [(1100, 300), (1700, 100)]
    assert space.take(2) == (1100, 2, False)
    assert space.take(2) == (1300, 1, False)
    assert space.take(2) == (1700, 1, False)
    assert space.take(2) == (2000, 2, True)


async def test_take_whole_splits_a_hole_that_is_large_enough() -> None:
    space = _space()
    space.take(10)
    space.free(1000)
    space.free(1500, 3)
    await _release(space)
    assert space.take_whole(2) == (1500, False)
    assert space.free_ranges == [(1000, 100), (1700, 100)]
    assert space.take_whole(2) == (2000, True)
    assert space.take_whole(1) == (1000, False)
    assert space.free_ranges == [(1700, 100)]


async def test_the_tail_is_given_back_to_the_end_and_is_no_longer_zeroed() -> None:
    space = _space()
    space.take(5)
    space.free(1200, 2)
    await _release(space)
    assert space.end == 1500
    space.free(1400)
    await _release(space)
    assert space.end == 1200 and space.free_ranges == []
    assert space.take(4) == (1200, 4, False)
    assert space.take() == (1600, 1, True)


async def test_a_unit_freed_twice_is_free_once() -> None:
    space = _space()
    space.take(3)
    space.free(1000)
    space.free(1000)
    await _release(space)
    assert space.free_ranges == [(1000, 100)]


async def test_without_reuse_nothing_comes_back() -> None:
    space = _space(reuse=False)
    space.take(2)
    space.free(1000, 2)
    await _release(space)
    assert space.take() == (1200, 1, True)


def test_the_limit() -> None:
    space = _space(limit=1250)
    assert space.take(5) == (1000, 2, True)
    with pytest.raises(OSError, match="cannot address more than 1250 bytes") as caught:
        space.take()
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="1250"):
        space.take_whole(1)
    assert _space(limit=UNBOUNDED).take_whole(1 << 30)[0] == 1000


async def test_freed_units_are_punched_before_they_are_free() -> None:
    class Slow(MemoryStorage):
        async def discard(self, offset: int, length: int) -> None:
            assert space.free_ranges == []
            await super().discard(offset, length)

    storage = Slow(b"x" * (1 << 20))
    space = AppendSpace(storage, 65536, 1 << 20, punch=True)
    space.free(65536, 2)
    space.free(655360)
    await _release(space)
    assert storage.allocated_size() == (1 << 20) - 3 * 65536
    assert space.free_ranges == [(65536, 131072), (655360, 65536)]


def test_holes_that_are_there_at_first_are_free_and_hold_junk() -> None:
    storage = MemoryStorage(b"x" * 1000)
    space = AppendSpace(storage, 100, 1000, punch=True)
    space.add_free([(300, 200), (100, 100)])
    assert storage.allocated_size() == 65536  # nothing is punched
    assert space.take(5) == (100, 1, False)
    assert space.take(5) == (300, 2, False)
