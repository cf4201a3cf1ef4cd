from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from nbdserve.block.node import Node
from nbdserve.jobs.stretches import Stretch, What, in_units, skipping_zeroes, stretches
from tests.block.layers import Scripted

LETTERS = "DZ."


async def drawn(source: AsyncIterator[Stretch]) -> str:
    """Stretches as one letter for 4 bytes; they continue each other and are merged."""
    result, position, before = "", None, None
    async for offset, length, what in source:
        assert position in (None, offset)
        assert what != before
        assert length > 0
        position, before = offset + length, what
        result += LETTERS[what] * (length // 4)
    return result


@pytest.mark.parametrize(
    ("layers", "above", "expected"),
    [
        (["DZ.CD"], None, "DZZDD"),
        (["DZ...", "D.DZ."], None, "DZDZZ"),
        (["DZ...", "D.DZ."], 1, "DZ..."),
        (["DZ...", "D.DZ."], 2, "DZDZZ"),
        (["D....", ".ZD..", "DDDD."], 2, "DZD.."),
        (["D....", ".Z", "DDDD."], 2, "DZZZZ"),
        (["D....", "DD"], 1, "D.ZZZ"),
    ],
)
async def test_what_is_copied(layers: list[str], above: int | None, expected: str) -> None:
    node = Node([Scripted(clusters, chr(97 + number)) for number, clusters in enumerate(layers)])
    assert await drawn(stretches(node, 0, node.size, above=above)) == expected


async def given(letters: str, start: int = 0) -> AsyncIterator[Stretch]:
    """The stretches ``letters`` stand for, one byte each."""
    at = 0
    while at < len(letters):
        end = at
        while end < len(letters) and letters[end] == letters[at]:
            end += 1
        yield Stretch(start + at, end - at, What(LETTERS.index(letters[at])))
        at = end


@pytest.mark.parametrize("seed", range(60))
async def test_units_that_are_not_of_one_sort_are_data(seed: int) -> None:
    choose = random.Random(seed)
    letters = "".join(choose.choice(LETTERS) * choose.randrange(1, 12) for _ in range(choose.randrange(1, 8)))
    unit = choose.choice([1, 2, 4, 8])
    result = ""
    async for offset, length, what in in_units(given(letters), unit, len(letters)):
        assert offset == len(result)
        result += LETTERS[what] * length
    expected = ""
    for start in range(0, len(letters), unit):
        part = letters[start : start + unit]
        expected += (part[0] if len(set(part)) == 1 else "D") * len(part)
    assert result == expected


async def test_units_begin_where_the_copy_does() -> None:
    found = [stretch async for stretch in in_units(given("DDZZZZZZZ", 6), 8, 15)]
    assert found == [(6, 2, What.DATA), (8, 7, What.ZERO)]


async def test_zeroes_that_are_there_anyway() -> None:
    assert [what async for _, _, what in skipping_zeroes(given("DZ."))] == [What.DATA, What.SKIP, What.SKIP]
