"""The bitmaps of one disk: names, recording, and successors."""

from __future__ import annotations

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.bitmaps.bitmap_set import BitmapSet
from nbdserve.errors import ConfigError
from nbdserve.units import KIB, MIB


def names(bitmaps: BitmapSet) -> list[str | None]:
    return [bitmap.name for bitmap in bitmaps]


def dirty(bitmap: DirtyBitmap) -> list[int]:
    return [at for at in range(bitmap.size // bitmap.granularity) if bitmap.is_dirty(at * bitmap.granularity)]


def test_names_are_found_and_taken() -> None:
    bitmaps = BitmapSet(MIB)
    assert not bitmaps
    first = bitmaps.add("a")
    bitmaps.add(None)
    bitmaps.add("b", 4 * KIB)
    assert names(bitmaps) == ["a", "b"]
    assert bitmaps.get("a") is first
    with pytest.raises(ConfigError, match=r"^Bitmap already exists: a$"):
        bitmaps.add("a")
    with pytest.raises(ConfigError, match=r"^Dirty bitmap 'c' not found$"):
        bitmaps.get("c")
    bitmaps.discard(first)
    assert bitmaps.find("a") is None


def test_those_that_record_note_changes() -> None:
    bitmaps = BitmapSet(MIB)
    on, off, anonymous = bitmaps.add("on"), bitmaps.add("off", 4 * KIB), bitmaps.add(None)
    off.disabled = True
    bitmaps.changed(100 * KIB, 100 * KIB)
    assert dirty(on) == dirty(anonymous) == [1, 2, 3]
    assert dirty(off) == []
    bitmaps.resize(2 * MIB)
    assert dirty(off) == list(range(256, 512))
    assert bitmaps.add("new").size == 2 * MIB


@pytest.mark.parametrize("disabled", [False, True])
def test_a_successor_records_meanwhile(disabled: bool) -> None:
    bitmaps = BitmapSet(MIB)
    bitmap = bitmaps.add("b")
    bitmaps.changed(0, 1)
    bitmap.disabled = disabled
    bitmaps.create_successor(bitmap)
    assert bitmap.busy
    assert bitmap.recording is not disabled
    bitmaps.changed(MIB - 1, 1)
    assert dirty(bitmap) == [0]
    with pytest.raises(ConfigError, match="in use by another operation"):
        bitmaps.create_successor(bitmap)
    bitmaps.resize(MIB + 64 * KIB)
    bitmaps.reclaim(bitmap)
    assert dirty(bitmap) == ([0, 16] if disabled else [0, 15, 16])
    assert not bitmap.busy
    assert bitmap.disabled is disabled
    assert bitmap.recording is not disabled
    bitmaps.changed(128 * KIB, 1)
    assert bitmap.is_dirty(128 * KIB) is not disabled


def test_a_successor_takes_over() -> None:
    bitmaps = BitmapSet(MIB)
    bitmap = bitmaps.add("b")
    bitmap.persistent = True
    bitmaps.add("c")
    bitmaps.changed(0, 1)
    bitmaps.create_successor(bitmap)
    bitmaps.changed(MIB - 1, 1)
    after = bitmaps.abdicate(bitmap)
    assert names(bitmaps) == ["b", "c"]
    assert bitmaps.get("b") is after
    assert dirty(after) == [15]
    assert after.persistent
    assert not after.busy
    assert after.recording
    bitmaps.changed(64 * KIB, 1)
    assert dirty(bitmap) == [0]
    assert dirty(after) == [1, 15]
