"""One bitmap against a set of bytes' granules, its states, and QEMU's words for what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.bitmaps.bitmap import MAX_GRANULARITY, DirtyBitmap
from nbdserve.errors import ConfigError
from nbdserve.units import GIB, KIB, TIB

SIZE = 40 * KIB + 100
GRANULARITY = 1024


def dirty(bitmap: DirtyBitmap) -> set[int]:
    return {at for at in range(-(-bitmap.size // bitmap.granularity)) if bitmap.is_dirty(at * bitmap.granularity)}


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 5000)), max_size=6), st.integers(0, SIZE - 1))
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_dirty(writes: list[tuple[int, int]], start: int) -> None:
    bitmap = DirtyBitmap("b", SIZE, GRANULARITY)
    model: set[int] = set()
    for offset, longest in writes:
        length = min(longest, SIZE - offset)
        bitmap.set(offset, length)
        model |= set(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1))
    assert dirty(bitmap) == model
    assert bitmap.count() == len(model) * GRANULARITY
    is_dirty = [at // GRANULARITY in model for at in range(SIZE)]
    assert bitmap.next_dirty(start) == next((at for at in range(start, SIZE) if is_dirty[at]), None)
    assert bitmap.next_clean(start) == next((at for at in range(start, SIZE) if not is_dirty[at]), None)
    starts, values, end = bitmap.runs(start, SIZE, 1000)
    edges = [start, *(at for at in range(start + 1, SIZE) if is_dirty[at] != is_dirty[at - 1]), SIZE]
    assert [*starts.tolist(), end] == edges
    assert values.tolist() == [is_dirty[at] for at in edges[:-1]]
    area = bitmap.next_dirty_area(start, SIZE, 1500)
    if area is None:
        assert not any(is_dirty[start:])
    else:
        assert area[1] <= 1500
        assert all(is_dirty[area[0] : sum(area)])
        assert not any(is_dirty[start : area[0]])


def test_runs_stop_where_there_are_enough() -> None:
    bitmap = DirtyBitmap("b", SIZE, GRANULARITY)
    bitmap.set(3000, 1)
    assert [part.tolist() if hasattr(part, "tolist") else part for part in bitmap.runs(100, SIZE, 2)] == [
        [100, 2048],
        [False, True],
        3072,
    ]


def test_clearing_and_taking_it_back() -> None:
    bitmap = DirtyBitmap("b", SIZE, GRANULARITY)
    bitmap.set(0, SIZE)
    before = bitmap.clear()
    assert dirty(bitmap) == set()
    bitmap.set(1, 1)
    kept = bitmap.snapshot()
    bitmap.restore(before)
    assert bitmap.count() == 41 * GRANULARITY
    bitmap.clear_range(2048, SIZE - 2048)
    assert dirty(bitmap) == {0, 1}
    bitmap.restore(kept)
    assert dirty(bitmap) == {0}


@pytest.mark.parametrize("size", [SIZE + 1, SIZE + 900, SIZE + 5000, SIZE - 1, SIZE - 99, SIZE - 5000, 1])
def test_what_is_new_after_a_resize_is_dirty(size: int) -> None:
    bitmap = DirtyBitmap("b", SIZE, GRANULARITY)
    bitmap.set(0, 1)
    bitmap.set(SIZE - 6000, 1)
    kept = {at for at in dirty(bitmap) if at * GRANULARITY < size}
    bitmap.resize(size)
    assert bitmap.size == size
    assert dirty(bitmap) == kept | set(range(SIZE // GRANULARITY, -(-size // GRANULARITY)) if size > SIZE else ())
    bitmap.resize(SIZE + 8000)
    assert bitmap.is_dirty(SIZE + 7999)
    assert bitmap.is_dirty(size)


def test_granularities() -> None:
    for granularity in (0, 256, 513, 1000, 2 * MAX_GRANULARITY):
        with pytest.raises(ConfigError, match=r"^Granularity must be power of 2 and at least 512$"):
            DirtyBitmap("b", SIZE, granularity)
    for granularity in (512, MAX_GRANULARITY):
        bitmap = DirtyBitmap("b", 5 * GIB, granularity)
        bitmap.set(5 * GIB - 1, 1)
        assert bitmap.count() == granularity
    with pytest.raises(ConfigError, match="needs a granularity of 16384 bytes or more"):
        DirtyBitmap("b", 128 * TIB, 8192)


def test_names() -> None:
    DirtyBitmap("x" * 1023, SIZE)
    for name, problem in (("", "^Bitmap name cannot be empty$"), ("x" * 1024, "too long"), ("ä" * 512, "too long")):
        with pytest.raises(ConfigError, match=problem):
            DirtyBitmap(name, SIZE)


@pytest.mark.parametrize("other", [512, 1024, 8192])
def test_merge_across_granularities(other: int) -> None:
    target, source = DirtyBitmap("t", SIZE, GRANULARITY), DirtyBitmap("s", SIZE, other)
    target.set(0, 1)
    source.set(9000, 1)
    source.set(SIZE - 1, 1)
    target.merge(source)
    wanted = {0} | {at // GRANULARITY for at in range(SIZE) if source.is_dirty(at)}
    assert dirty(target) == wanted


def test_merge_of_different_sizes_is_refused() -> None:
    target, source = DirtyBitmap("t", 1024), DirtyBitmap("s", 2048)
    with pytest.raises(ConfigError) as error:
        target.merge(source)
    assert str(error.value) == (
        "Bitmaps are of different sizes (destination size is 1024, source size is 2048) and can't be merged"
    )


def test_unusable_bitmaps_are_neither_changed_nor_read() -> None:
    good, bad = DirtyBitmap("good", SIZE), DirtyBitmap("bad", SIZE)
    bad.busy = True
    for use in (bad.check_usable, lambda: bad.merge(good), lambda: good.merge(bad)):
        with pytest.raises(ConfigError) as error:
            use()
        assert str(error.value) == "Bitmap 'bad' is currently in use by another operation and cannot be used"
    bad.busy, bad.read_only = False, True
    good.merge(bad)
    with pytest.raises(ConfigError, match=r"^Bitmap 'bad' is readonly and cannot be modified$"):
        bad.merge(good)
    bad.read_only, bad.inconsistent = False, True
    with pytest.raises(ConfigError, match="Bitmap 'bad' is inconsistent and cannot be used"):
        good.merge(bad)
