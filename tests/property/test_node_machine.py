"""A node against a bytearray: any sequence of requests, at any byte, with the mapping told truthfully."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdserve.block import status
from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_WAIT
from tests.support.geometries import CRASH_GEOMETRIES, Image, build, named
from tests.support.images import HAVE_QEMU
from tests.support.recording import ByteStorage
from tests.support.workload import read_as_served, submit

STEPS = int(os.environ.get("NBDSERVE_STEPS", "30"))
EXAMPLES = int(os.environ.get("NBDSERVE_EXAMPLES", "25"))
NAMES = [geometry.name for geometry in CRASH_GEOMETRIES]
T = TypeVar("T")
ZERO_FLAG = 2


class NodeMachine(RuleBasedStateMachine):
    """One image of a random geometry in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.node: Node | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize(name=st.sampled_from(NAMES))
    def open(self, name: str) -> None:
        self.image: Image = build(named(CRASH_GEOMETRIES, name))
        self.stores = [ByteStorage(content) for content in self.image.contents]
        self.content = bytearray(self.image.guest)
        self.size = len(self.content)
        self.node = self.run(self.image.open(self.stores))
        assert self.node.size == self.size

    def place(self, where: float, length: int, unit: int) -> tuple[int, int]:
        """A range of the disk from the drawn numbers; its start is a multiple of ``unit``."""
        length = min(length, self.size)
        offset = int(where * (self.size - length))
        return offset - offset % unit, length

    where = st.floats(0, 1)
    length = st.one_of(st.integers(1, 2000), st.sampled_from((512, 4096, 16384, 65536, 131072)), st.integers(1, 300000))
    unit = st.sampled_from((1, 512, 4096, 65536))

    @rule(where=where, length=length, unit=unit, pattern=st.integers(1, 255), fua=st.booleans(), attempt=st.booleans())
    def write(self, where: float, length: int, unit: int, pattern: int, fua: bool, attempt: bool) -> None:
        assert self.node
        offset, length = self.place(where, length, unit)
        data = bytes((pattern + i // 512) % 255 + 1 for i in range(0, length)) if length < 3000 else None
        data = data or (bytes([pattern, 255 - pattern, 7]) * (length // 3 + 1))[:length]
        if fua or not attempt or self.run(submit(self.node, offset, data)) == WRITE_WAIT:
            self.run(self.node.write(offset, data, fua=fua))
        self.content[offset : offset + length] = data

    @rule(where=where, length=length, unit=unit, unmap=st.booleans())
    def zero(self, where: float, length: int, unit: int, unmap: bool) -> None:
        assert self.node
        offset, length = self.place(where, length, unit)
        self.run(self.node.zero(offset, length, unmap=unmap))
        self.content[offset : offset + length] = bytes(length)

    @rule(where=where, length=length, unit=unit)
    def zero_fast(self, where: float, length: int, unit: int) -> None:
        assert self.node
        offset, length = self.place(where, length, unit)
        try:
            self.run(self.node.zero(offset, length, fast=True))
        except OSError:
            return
        self.content[offset : offset + length] = bytes(length)

    @rule(where=where, length=length, unit=unit)
    def discard(self, where: float, length: int, unit: int) -> None:
        assert self.node
        offset, length = self.place(where, length, unit)
        self.run(self.node.discard(offset, length))
        found = self.run(self.node.read(offset, length))
        before = self.content[offset : offset + length]
        assert all(new in (0, old) for new, old in zip(found, before, strict=True)), "discard showed other data"
        self.content[offset : offset + length] = found

    @rule(where=where, length=length, unit=unit)
    def read(self, where: float, length: int, unit: int) -> None:
        assert self.node
        offset, length = self.place(where, length, unit)
        assert self.run(read_as_served(self.node, offset, length)) == self.content[offset : offset + length]

    @rule(where=where, length=length, unit=unit, most=st.sampled_from((1, 2, 1 << 20)))
    def allocation(self, where: float, length: int, unit: int, most: int) -> None:
        assert self.node
        offset, length = self.place(where, length, unit)
        both = self.run(
            status.block_status(self.node, offset, length, [status.allocation_flags, status.depth_values], most)
        )
        extents, depths = both
        covered = sum(extent[0] for extent in extents)
        assert covered == sum(depth[0] for depth in depths), "the contexts cover different ranges"
        assert covered == length or max(len(extents), len(depths)) == most
        assert 1 <= len(depths) <= most
        assert all(0 <= depth[1] <= len(self.node.layers) for depth in depths)
        assert 1 <= len(extents) <= most
        assert all(extent[0] > 0 for extent in extents)
        assert covered <= length
        assert all(a[1] != b[1] for a, b in pairwise(extents)), "neighbours are not merged"
        for size, flags in extents:
            if flags & ZERO_FLAG:
                assert not any(self.content[offset : offset + size]), "ZERO claimed where there is data"
            offset += size

    @rule()
    def flush(self) -> None:
        assert self.node
        self.run(self.node.flush())

    @rule()
    def reopen(self) -> None:
        assert self.node
        self.run(self.node.close())
        self.stores = [ByteStorage(store.content) for store in self.stores]
        self.node = self.run(self.image.open(self.stores))

    @precondition(lambda self: self.node is not None)
    @invariant()
    def metadata_is_consistent(self) -> None:
        """What has been flushed is a valid image at any time: at the latest after a close."""
        assert self.node and self.node.size == self.size

    def teardown(self) -> None:
        if self.node is not None:
            assert self.run(self.node.read(0, self.size)) == self.content
            self.run(self.node.close())
            node = self.run(self.image.open([ByteStorage(store.content) for store in self.stores], read_only=True))
            assert self.run(node.read(0, self.size)) == self.content
            if node.top.can("check"):
                result = self.run(node.top.check())
                assert not (result.corruptions or result.check_errors or result.leaks), result.messages[:5]
        self.loop.close()


NodeMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="NBDSERVE_RANDOM" not in os.environ,
)


TestNodeMachine = pytest.mark.skipif(not HAVE_QEMU, reason="the images are made by qemu-img")(NodeMachine.TestCase)
