from __future__ import annotations

import pytest

from nbdserve.protocol.meta_contexts import list_contexts, select_contexts

AVAILABLE = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b")


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ([], AVAILABLE),
        (["base:"], AVAILABLE[:1]),
        (["qemu:"], AVAILABLE[1:]),
        (["qemu:dirty-bitmap:"], AVAILABLE[2:]),
        (["qemu:dirty-bitmap:b", "base:allocation"], (AVAILABLE[0], AVAILABLE[3])),
        (["base:", "base:allocation"], AVAILABLE[:1]),
        (["base", "qemu", "", ":", "base:alloc", "other:", "base:allocation:x", "qemu:dirty"], ()),
    ],
)
def test_list(queries: list[str], names: tuple[str, ...]) -> None:
    assert list_contexts(AVAILABLE, queries) == [(0, name) for name in names]


@pytest.mark.parametrize(
    ("queries", "numbers"),
    [
        ([], []),
        (["base:", "qemu:", "qemu:dirty-bitmap:"], []),
        (["qemu:dirty-bitmap:b", "base:allocation"], [0, 3]),
        (["base:allocation", "base:allocation"], [0]),
        (["nonsense", "x:y", "base:unknown"], []),
    ],
)
def test_select(queries: list[str], numbers: list[int]) -> None:
    assert select_contexts(AVAILABLE, queries) == [(number, AVAILABLE[number]) for number in numbers]


def test_a_bitmap_has_the_number_qemu_gives_it_without_the_depth_too() -> None:
    available = (AVAILABLE[0], *AVAILABLE[2:])
    assert select_contexts(available, available) == [(0, AVAILABLE[0]), (2, AVAILABLE[2]), (3, AVAILABLE[3])]
