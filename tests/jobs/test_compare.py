from __future__ import annotations

import random

import pytest

from nbdserve.block.node import Node
from nbdserve.jobs.compare import CompareJob, first_data, first_difference, first_status_mismatch
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB
from tests.block.layers import Scripted, raw_node


def layered(*layers: str, letter: str = "a") -> Node:
    return Node([Scripted(clusters, chr(ord(letter) + number)) for number, clusters in enumerate(layers)])


async def mismatch(one: Node, other: Node) -> int | None:
    job = CompareJob("job", one, other)
    await job.result()
    return job.mismatch


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (["DZ.D"], ["D..D"], None),
        (["DZ.D"], ["DD.D"], 4),
        (["D..", "ZD"], ["DZZ", ""], 4),
        (["D."], ["D..Z."], None),
        (["D."], ["D..ZD"], 16),
        ([""], [""], None),
    ],
)
async def test_maps(one: list[str], other: list[str], expected: int | None) -> None:
    assert await mismatch(layered(*one), layered(*other)) == expected
    assert await mismatch(layered(*other), layered(*one)) == expected


@pytest.mark.parametrize("at", [0, 511, 512, (2 * MIB) - 1, (2 * MIB), 3 * (2 * MIB) + 1000])
async def test_the_first_of_many_differences(at: int) -> None:
    content = random.Random(1).randbytes(4 * (2 * MIB))
    changed = bytearray(content)
    for offset in (at, 4 * (2 * MIB) - 1):
        changed[offset] ^= 1
    one, other = await raw_node(MemoryStorage(content)), await raw_node(MemoryStorage(bytes(changed)))
    assert await mismatch(one, other) == at // 512 * 512


async def test_equal_data_and_progress() -> None:
    content = random.Random(1).randbytes(3 * (2 * MIB) + 77)
    job = CompareJob("job", await raw_node(MemoryStorage(content)), await raw_node(MemoryStorage(content)))
    await job.result()
    assert job.mismatch is None
    assert job.current_progress == job.total_progress == len(content)


def test_sectors() -> None:
    assert first_difference(bytearray(1000), bytearray(1000)) is None
    assert first_difference(bytearray(1000), bytearray(600) + bytearray(b"x" * 400)) == 512
    assert first_data(bytearray(2000)) is None
    assert first_data(bytearray(1500) + bytearray(b"x" * 500)) == 1024


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("DZ.D", "DZ.D", None),
        ("DZ.D", "D..D", 4),
        ("DZ.D", "DZ.C", 12),
        ("DZ", "DZ..", 4),
        ("DZ..", "DZ.Z", 8),
        ("", "D", None),
    ],
)
async def test_what_is_allocated(one: str, other: str, expected: int | None) -> None:
    assert await first_status_mismatch(layered(one), layered(other)) == expected
