"""What a bitmap holds after a backup, by mode and outcome, and QEMU's words for what does not go together."""

from __future__ import annotations

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.bitmaps.bitmap_set import BitmapSet
from nbdserve.errors import ConfigError
from nbdserve.jobs.bitmap_sync import BitmapSync, check_modes, find_bitmap
from nbdserve.units import KIB

UNIT = 64 * KIB
SIZE = 10 * UNIT


def dirty(bitmap: DirtyBitmap) -> set[int]:
    return {at for at in range(10) if bitmap.is_dirty(at * UNIT)}


@pytest.mark.parametrize(
    ("mode", "succeeded", "expected"),
    [
        ("on-success", True, {5}),
        ("on-success", False, {1, 2, 3, 5}),
        ("never", True, {1, 2, 3, 5}),
        ("never", False, {1, 2, 3, 5}),
        ("always", True, {5}),
        ("always", False, {3, 5}),
    ],
)
@pytest.mark.parametrize("disabled", [False, True])
def test_what_it_holds_afterwards(mode: str, succeeded: bool, expected: set[int], disabled: bool) -> None:
    """Dirty before: 1, 2, 3, of which 3 is not copied when the job fails. Changed meanwhile: 5."""
    bitmaps = BitmapSet(SIZE)
    bitmap = bitmaps.add("b", UNIT)
    bitmaps.changed(UNIT, 3 * UNIT)
    bitmap.disabled = disabled
    sync = BitmapSync(bitmaps, bitmap, mode)
    assert dirty(sync.bitmap) == {1, 2, 3}
    bitmaps.changed(5 * UNIT, 1)
    assert dirty(sync.bitmap) == {1, 2, 3}
    with pytest.raises(ConfigError, match="in use by another operation"):
        BitmapSync(bitmaps, bitmap, mode)
    left = DirtyBitmap(None, SIZE, UNIT)
    left.set(3 * UNIT, 1)
    sync.finish(succeeded, left)
    after = bitmaps.get("b")
    assert dirty(after) == (expected - {5} if disabled else expected)
    assert after.disabled is disabled
    assert not after.busy
    assert len(list(bitmaps)) == 1
    bitmaps.changed(9 * UNIT, 1)
    assert after.is_dirty(9 * UNIT) is not disabled


def test_what_was_not_copied_is_all_of_it_when_nobody_knows() -> None:
    bitmaps = BitmapSet(SIZE)
    bitmap = bitmaps.add("b", UNIT)
    bitmaps.changed(0, 1)
    BitmapSync(bitmaps, bitmap, "always").finish(False)
    assert dirty(bitmaps.get("b")) == {0}


def test_one_that_cannot_be_changed_can_be_read() -> None:
    bitmaps = BitmapSet(SIZE)
    bitmap = bitmaps.add("b", UNIT)
    bitmap.read_only = True
    for mode in ("on-success", "always"):
        with pytest.raises(ConfigError, match="readonly and cannot be modified"):
            BitmapSync(bitmaps, bitmap, mode)
    BitmapSync(bitmaps, bitmap, "never").finish(True)
    bitmap.inconsistent = True
    with pytest.raises(ConfigError, match="inconsistent"):
        BitmapSync(bitmaps, bitmap, "never")
    assert not bitmap.busy


@pytest.mark.parametrize(
    ("sync", "bitmap", "mode", "problem"),
    [
        ("bitmap", None, "never", "must provide a valid bitmap name for 'bitmap' sync mode"),
        ("incremental", None, None, "must provide a valid bitmap name for 'incremental' sync mode"),
        ("incremental", "b", "always", "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"),
        ("bitmap", "b", None, "Bitmap sync mode must be given when providing a bitmap"),
        ("full", None, "always", "Cannot specify bitmap sync mode without a bitmap"),
        ("none", "b", "always", "sync mode 'none' does not produce meaningful bitmap outputs"),
        ("top", "b", "never", "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'top'"),
    ],
)
def test_what_does_not_go_together(sync: str, bitmap: str | None, mode: str | None, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_modes(sync, bitmap, mode)
    assert str(error.value) == problem


def test_what_does() -> None:
    assert check_modes("full", None, None) is None
    assert check_modes("incremental", "b", None) == check_modes("incremental", "b", "on-success") == "on-success"
    for sync in ("full", "top", "bitmap"):
        assert check_modes(sync, "b", "always") == "always"
    assert check_modes("bitmap", "b", "never") == "never"
    bitmaps = BitmapSet(SIZE)
    with pytest.raises(ConfigError, match=r"^Bitmap 'b' could not be found$"):
        find_bitmap(bitmaps, "b")
    assert find_bitmap(bitmaps, bitmaps.add("b").name or "") is bitmaps.get("b")
