from __future__ import annotations

import random

import pytest

from nbdserve.formats.raw_cow.bitmap import Bitmap

CLUSTERS = 5003


def random_bitmap(seed: int) -> tuple[Bitmap, list[int]]:
    """A bitmap and the same as a list, in stretches from one bit to thousands."""
    rng = random.Random(seed)
    model: list[int] = []
    while len(model) < CLUSTERS:
        model += [rng.randrange(2)] * int(2 ** (rng.random() * 12))
    del model[CLUSTERS:]
    stored = bytearray(sum(bit << i for i, bit in enumerate(model)).to_bytes(1024, "little"))
    return Bitmap(4096, CLUSTERS, stored), model


@pytest.mark.parametrize("seed", range(5))
def test_stretches_end_where_the_bits_change(seed: int) -> None:
    bitmap, model = random_bitmap(seed)
    assert bitmap.missing == model.count(0)
    rng = random.Random(seed)
    for _ in range(300):
        index = rng.randrange(CLUSTERS)
        stop = rng.randrange(index, CLUSTERS) + 1
        expected = next((i for i in range(index, stop) if model[i] != model[index]), stop)
        assert bitmap.run_end(index, stop) == expected
        assert bitmap.count(index, stop) == sum(model[index:stop])
        assert bitmap.array(index, stop).tolist() == model[index:stop]


@pytest.mark.parametrize("seed", range(5))
def test_bits_are_set_and_cleared(seed: int) -> None:
    bitmap, model = random_bitmap(seed)
    rng = random.Random(seed + 100)
    for _ in range(50):
        first = rng.randrange(CLUSTERS)
        end = rng.randrange(first, min(CLUSTERS, first + rng.choice((1, 10, 3000)))) + 1
        value = rng.randrange(2)
        before = bytes(bitmap.bits)
        bitmap.dirty.clear()
        (bitmap.set if value else bitmap.clear)(first, end)
        model[first:end] = [value] * (end - first)
        assert bitmap.array(0, CLUSTERS).tolist() == model
        assert bitmap.missing == model.count(0)
        changed = {i // 512 for i in range(len(before)) if bitmap.bits[i] != before[i]}
        assert changed <= bitmap.dirty


def test_what_is_dirty_is_written_where_it_belongs() -> None:
    bitmap = Bitmap(4096, 1 << 20, bytearray(1 << 17))
    bitmap.set(4095, 4097)
    bitmap.set((1 << 20) - 1, 1 << 20)
    pieces = bitmap.pieces(bitmap.dirty)
    assert [(offset, len(data)) for offset, data in pieces] == [(4096, 1024), (4096 + (1 << 17) - 512, 512)]
    assert pieces[0][1] == bytes(511) + b"\x80\x01" + bytes(511)
    assert pieces[1][1] == bytes(511) + b"\x80"


def test_bits_behind_the_last_cluster_count_for_nothing() -> None:
    bitmap = Bitmap(4096, 13, bytearray(b"\xff" * 512))
    assert bitmap.missing == 0
    assert bitmap.stray() == 512 * 8 - 13
    assert bitmap.run_end(0, 13) == 13


def test_a_resized_bitmap() -> None:
    bitmap = Bitmap(4096, 5000, bytearray(b"\xff" * 1024))
    bitmap.clear(5000, 8192)
    bitmap.resize(10_000)
    assert (bitmap.clusters, bitmap.missing, len(bitmap.bits)) == (10_000, 5000, 1536)
    assert bitmap.run_end(0, 10_000) == 5000
    bitmap.dirty.clear()
    bitmap.resize(100)
    assert (bitmap.clusters, bitmap.missing, len(bitmap.bits)) == (100, 0, 512)
    assert bitmap.stray() == 0
    assert bitmap.dirty == {0}


def test_no_bits() -> None:
    bitmap = Bitmap(4096, 0, bytearray())
    assert (bitmap.missing, bitmap.stray(), len(bitmap.bits)) == (0, 0, 0)
