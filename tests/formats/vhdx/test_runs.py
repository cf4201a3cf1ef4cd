"""The mapping in columns says what ``lookup`` says, from any place to any other."""

from __future__ import annotations

import random

import pytest

from nbdserve.block.node import Node
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.units import GIB, MIB
from tests.formats.vhdx.helpers import agrees, driver_of, made, node_on, parent_and_child, random_changes

SIZE = 12 * MIB + 512


async def _image(kind: str) -> Node:
    if kind == "differencing":
        parent, child, model = await parent_and_child(SIZE, "block_size=2M")
        node = await node_on(child, parent, discard="unmap")
    else:
        node, model = await node_on(await made(SIZE, kind), discard="unmap"), bytearray(SIZE)
    await random_changes(node, model, 60, 5)
    return node


@pytest.mark.parametrize("kind", ["block_size=1M", "block_size=4M,subformat=fixed", "differencing"])
async def test_any_range(kind: str) -> None:
    driver = driver_of(await _image(kind))
    rng = random.Random(kind)
    await agrees(driver)
    for _ in range(20):
        start, end = sorted(rng.sample(range(SIZE + 1), 2))
        await agrees(driver, start, end)


async def test_neighbours_are_joined() -> None:
    node = await node_on(await made(9 * GIB, "block_size=1M"))
    await node.write(10 * MIB, b"x" * (3 * MIB))
    rows = await agrees(driver_of(node), 0, 100 * MIB)
    assert [(start, length, kind) for start, length, kind, _ in rows] == [
        (0, 10 * MIB, ZERO),
        (10 * MIB, 3 * MIB, DATA),
        (13 * MIB, 87 * MIB, ZERO),
    ]


async def test_a_large_disk_takes_few_pieces() -> None:
    driver = driver_of(await node_on(await made(64 << 30, "block_size=1M,block_state_zero=off"), read_only=True))
    pieces = [piece async for piece in driver.iter_runs(0, 64 << 30)]
    assert len(pieces) == 9
    assert {kind for piece in pieces for kind in piece.kind.tolist()} == {UNALLOCATED}
