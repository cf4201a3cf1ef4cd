"""Sector bitmaps against a list of booleans, and their cache."""

from __future__ import annotations

import random

import pytest

from nbdserve.formats.vpc.bitmaps import BitmapCache


@pytest.mark.parametrize("sectors", [1, 8, 100, 4096, 8192])
def test_set_and_run(sectors: int) -> None:
    rng = random.Random(sectors)
    size = -(-max(sectors, 1) // 4096) * 512
    bitmap = BitmapCache(size).add(0, 0, bytearray(size))
    model = [False] * sectors
    for _ in range(60):
        first = rng.randrange(sectors)
        count = rng.randint(1, min(rng.choice((1, 9, 70, sectors)), sectors - first))
        bitmap.set(first, count)
        model[first : first + count] = [True] * count
        for _ in range(20):
            first = rng.randrange(sectors)
            count = rng.randint(1, sectors - first)
            here, run = bitmap.run(first, count)
            assert here == model[first]
            expected = next((i for i in range(first, first + count) if model[i] != here), first + count) - first
            assert run == min(expected, 4096)
    assert [bool(bitmap.bits[i // 8] >> (7 - i % 8) & 1) for i in range(sectors)] == model


@pytest.mark.parametrize("sectors", [8, 4096, 8192])
def test_full(sectors: int) -> None:
    size = -(-sectors // 4096) * 512
    cache = BitmapCache(size, sectors=sectors)
    bitmap = cache.add(0, 0, bytearray(size))
    bitmap.set(0, sectors - 1)
    assert not bitmap.full
    bitmap.set(sectors - 1, 1)
    assert bitmap.full
    assert cache.add(1, 0, bytearray(bitmap.bits)).full


def test_only_changed_sectors_are_written() -> None:
    bitmap = BitmapCache(8192).add(0, 10_000, bytearray(8192))
    bitmap.set(4096 * 12 + 3, 2)
    assert bitmap.pieces(bitmap.dirty) == [(10_000 + 12 * 512, b"\x18" + bytes(511))]
    bitmap.dirty.clear()
    bitmap.set(4095, 2)
    assert bitmap.dirty == {0, 1}


def test_what_is_changed_or_pinned_stays() -> None:
    cache = BitmapCache(512, limit=0)
    changed, pinned = cache.add(0, 0, bytearray(512)), cache.add(1, 0, bytearray(512))
    changed.set(0, 1)
    pinned.pins += 1
    for index in range(2, 50):
        cache.add(index, 0, bytearray(512))
    assert cache.find(0) is changed
    assert cache.find(1) is pinned
    assert cache.find(2) is None
    assert len(cache.recent) + len(cache._old) < 15
    pinned.unpin()
    cache.changed.clear()
    for index in range(50, 100):
        cache.add(index, 0, bytearray(512))
    assert cache.peek(0) is None
    assert cache.peek(1) is None


def test_what_is_used_stays() -> None:
    cache = BitmapCache(512, limit=0)
    first = cache.add(0, 0, bytearray(512))
    for index in range(1, 100):
        cache.add(index, 0, bytearray(512))
        assert cache.find(0) is first


def test_crowded_and_restored() -> None:
    cache = BitmapCache(512, limit=0)
    bitmaps = [cache.add(index, 0, bytearray(512)) for index in range(5)]
    for bitmap in bitmaps:
        assert not cache.crowded
        bitmap.set(0, 1)
    assert cache.crowded
    cache.changed.clear()
    bitmaps[0].dirty.clear()
    bitmaps[0].restore([0])
    assert (cache.changed, bitmaps[0].dirty) == ({bitmaps[0]}, {0})
