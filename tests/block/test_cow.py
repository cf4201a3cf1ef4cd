"""The write engine over real layers in memory: a raw base under a qcow2 overlay, and raw images by themselves."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.block.cow import is_zero
from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_WAIT
from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.vhdx.create import create_vhdx
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import Scripted, overlay, raw_node
from tests.formats.vhdx.helpers import finish, made, node_on

CLUSTER = 4096
QCOW2_HEADER = b"QFI\xfb\x00\x00\x00\x03" + bytes(504)


def _base(size: int) -> tuple[MemoryStorage, bytes]:
    content = random.Random(size).randbytes(size)
    return MemoryStorage(content, path="base.raw"), content


class Yielding(MemoryStorage):
    """Never at once: every operation lets others go first, and counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.writes: list[tuple[int, int]] = []
        self.fail: set[int] = set()
        """Numbers of the writes that fail."""

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        super().try_read_into(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await asyncio.sleep(0)
        self.writes.append((offset, len(data)))
        if len(self.writes) - 1 in self.fail:
            raise OSError(errno.ENOSPC, "full")
        super().try_write(offset, data)


@pytest.mark.parametrize("base_size", [0, 100, 5000, 40_000, 100_000])
async def test_a_write_leaves_the_rest_of_its_cluster_as_the_base_has_it(base_size: int) -> None:
    base, content = _base(base_size)
    size = 40_960
    node = await overlay(base if base_size else None, size)
    model = bytearray(content.ljust(size, b"\0")[:size])
    for offset, length in ((4500, 10), (0, 1), (40_950, 10), (8192, 4096), (12_000, 9000), (4095, 2)):
        data = bytes([offset % 251 + 1]) * length
        await node.write(offset, data)
        model[offset : offset + length] = data
        assert await node.read(0, size) == model
    assert await base.read(0, base_size) == content, "the base is not touched"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from((0, 777, 20_000, 33_000)), st.booleans())
async def test_random_changes_give_what_a_flat_disk_would(seed: int, base_size: int, unmap: bool) -> None:
    rng = random.Random(seed)
    base, content = _base(base_size)
    size = 28_672 + 512 * rng.randrange(8)
    node = await overlay(base if base_size else None, size, unmap=unmap, storage=Yielding(path="top"))
    model = bytearray(content.ljust(size, b"\0")[:size])
    for _ in range(30):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice((1, 511, 512, 4096, 4097, 20_000)))
        action = rng.random()
        if action < 0.5:
            data = rng.randbytes(length)
            await node.write(offset, data)
            model[offset : offset + length] = data
        elif action < 0.75:
            await node.zero(offset, length, unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif action < 0.9:
            before = bytes(model)
            await node.discard(offset, length)
            after = await node.read(0, size)
            for at in range(size):
                assert after[at] == before[at] or (after[at] == 0 and unmap and offset <= at < offset + length)
            model[:] = after
        else:
            await node.flush()
        assert await node.read(0, size) == model


async def test_writes_into_one_new_cluster_at_once_all_survive() -> None:
    base, content = _base(CLUSTER * 4)
    node = await overlay(base, CLUSTER * 4, storage=Yielding(path="top"))
    model = bytearray(content)
    writes = [(offset, bytes([offset // 512 + 1]) * 300) for offset in range(100, CLUSTER * 3, 512)]
    random.Random(1).shuffle(writes)
    await asyncio.gather(*(node.write(offset, data) for offset, data in writes))
    for offset, data in writes:
        model[offset : offset + 300] = data
    assert await node.read(0, CLUSTER * 4) == model


async def test_overlapping_writes_have_the_result_of_some_order() -> None:
    node = await overlay(None, CLUSTER * 8, storage=Yielding(path="top"))
    for length in (512, CLUSTER, CLUSTER * 3):
        await asyncio.gather(*(node.write(700, bytes([value]) * length) for value in range(1, 7)))
        assert len(set(await node.read(700, length))) == 1
        await node.zero(0, CLUSTER * 8)


async def test_a_zero_does_not_undo_a_write_that_came_after_it_nor_the_other_way_round() -> None:
    base, _ = _base(CLUSTER * 4)
    node = await overlay(base, CLUSTER * 4, storage=Yielding(path="top"))
    zeroing = asyncio.create_task(node.zero(0, CLUSTER * 4))
    await zeroing
    await asyncio.gather(node.write(100, b"x" * 100), node.zero(CLUSTER, CLUSTER), node.write(2 * CLUSTER, b"y"))
    content = await node.read(0, CLUSTER * 4)
    assert content == (bytes(100) + b"x" * 100).ljust(2 * CLUSTER, b"\0") + b"y".ljust(2 * CLUSTER, b"\0")


async def test_a_write_that_fails_changes_nothing_and_can_be_repeated() -> None:
    base, content = _base(CLUSTER * 4)
    top = Yielding(path="top")
    node = await overlay(base, CLUSTER * 4, storage=top)
    await node.flush()
    top.fail = {len(top.writes)}
    with pytest.raises(OSError, match="full"):
        await node.write(100, b"x" * 5000)
    assert await node.read(0, CLUSTER * 4) == content
    lock = node.locks.exclusive(0, 1 << 40)
    assert node.locks.try_acquire(lock), "nothing is left locked"
    node.locks.release(lock)
    await node.write(100, b"x" * 5000)
    assert await node.read(0, CLUSTER * 4) == content[:100] + b"x" * 5000 + content[5100:]
    result = await node.top.check()
    assert not result.corruptions


async def test_a_disk_that_ends_inside_a_cluster_is_written_to_its_last_byte() -> None:
    base, content = _base(CLUSTER * 2)
    size = CLUSTER + 512
    node = await overlay(base, size)
    await node.write(size - 1, b"x")
    assert await node.read(0, size) == content[: size - 1] + b"x"
    await node.zero(CLUSTER, 512)
    assert await node.read(0, size) == content[:CLUSTER] + bytes(512)


# --- zeroing and discarding ------------------------------------------------------------------------------------------


async def test_whole_clusters_are_zeroed_in_the_mapping_without_writing() -> None:
    base, content = _base(CLUSTER * 8)
    top = Yielding(path="top")
    node = await overlay(base, CLUSTER * 8, storage=top)
    top.writes.clear()
    await node.zero(CLUSTER, CLUSTER * 6)
    assert top.writes == []
    assert await node.read(0, CLUSTER * 8) == content[:CLUSTER] + bytes(CLUSTER * 6) + content[7 * CLUSTER :]


async def test_zeroing_what_reads_as_zeroes_allocates_nothing() -> None:
    top = Yielding(path="top")
    node = await overlay(None, CLUSTER * 8, storage=top)
    top.writes.clear()
    await node.zero(100, CLUSTER * 3)
    assert top.writes == []


class Measured(MemoryStorage):
    """Notes what is written, and what is zeroed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.written = 0
        self.zeroed: list[tuple[int, int, bool]] = []

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self.written += len(data)
        await super().write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        self.zeroed.append((offset, length, unmap))
        await super().zero(offset, length, unmap=unmap)


async def test_zeroes_that_begin_and_end_inside_blocks_cost_no_more_than_these() -> None:
    """Blocks of 8 MiB over a parent that has data: the four whole ones are a change of the mapping."""
    parent = await made(48 * MIB, "block_size=16M")
    below = await node_on(parent)
    for offset in range(0, 48 * MIB, 16 * MIB):
        await below.write(offset, b"p" * 100)
        await below.write(offset + 9 * MIB, b"q" * 100)
    await finish(below)
    child = Measured(path="child.vhdx")
    await create_vhdx(
        child,
        48 * MIB,
        {"block_size": "8M", "backing_file": "parent.vhdx", "backing_fmt": "vhdx"},
        await read_structure(parent),
    )
    node = await node_on(child, parent)
    await node.write(41 * MIB, b"r" * 100)
    child.written, child.zeroed = 0, []
    await node.zero(3 * MIB + 100, 38 * MIB)
    data_zeroed = sum(length for _, length, _ in child.zeroed)
    assert data_zeroed <= 6 * MIB
    assert max(length for _, length, _ in child.zeroed) <= MIB
    assert child.written < 64 * KIB
    kinds = [run[0] for block in range(6) if (run := node.top.lookup(block * 8 * MIB, 512)) is not None]
    assert kinds == [UNALLOCATED, ZERO, ZERO, ZERO, ZERO, DATA]
    assert await node.read(0, 200) == b"p" * 100 + bytes(100)
    for offset in (3 * MIB + 100, 9 * MIB, 16 * MIB, 25 * MIB, 32 * MIB, 40 * MIB, 41 * MIB):
        assert await node.read(offset, 100) == bytes(100)
    assert await node.read(41 * MIB, 200) == bytes(200)
    assert await node.read(3 * MIB, 200) == bytes(200)


@pytest.mark.parametrize("unmap", [True, False])
async def test_new_space_is_zeroed_by_the_storage_and_only_where_something_shows(unmap: bool) -> None:
    """raw-cow has no word for zeroes; its base is a qcow2 image with a hole from 1 to 3 MiB."""
    below = await overlay(None, 4 * MIB, cluster_size=64 * KIB)
    await below.write(0, b"b" * MIB)
    await below.write(3 * MIB, b"c" * MIB)
    raw = Measured(path="vm.img")
    image = MemoryStorage(path="vm.raw-cow")
    options = {"raw_file": "vm.img", "backing_file": "base", "backing_fmt": "qcow2"}
    await RawCowDriver.create(image, 4 * MIB, options, companions=[raw])
    top = await RawCowDriver.open(image, {"companions": [raw]}, read_only=False)
    node = Node([top, *below.layers], unmap=True)
    await node.zero(300 * KIB + 7, 3 * MIB, unmap=unmap)
    model = bytearray(b"b" * MIB + bytes(2 * MIB) + b"c" * MIB)
    model[300 * KIB + 7 : 300 * KIB + 7 + 3 * MIB] = bytes(3 * MIB)
    assert await node.read(0, 4 * MIB) == model
    assert raw.written < 192 * KIB
    assert sum(length for _, length, _ in raw.zeroed) < MIB + 64 * KIB
    assert {given for _, _, given in raw.zeroed} == {unmap}
    assert top.lookup(MIB, 2 * MIB) == (UNALLOCATED, 2 * MIB, -1)


async def test_new_space_that_could_not_be_zeroed_is_not_shown() -> None:
    class Full(MemoryStorage):
        async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
            raise OSError(errno.ENOSPC, "full")

    base, content = _base(256 * KIB)
    node = await overlay(base, 256 * KIB, cluster_size=64 * KIB, storage=Full(path="top"), compat="0.10")
    with pytest.raises(OSError, match="full"):
        await node.zero(0, 256 * KIB, unmap=False)
    assert await node.read(0, 256 * KIB) == content
    await node.write(0, b"x" * 100)
    assert await node.read(0, 200) == b"x" * 100 + content[100:200]


async def test_a_discarded_cluster_does_not_show_the_base_again() -> None:
    base, content = _base(CLUSTER * 2)
    node = await overlay(base, CLUSTER * 2, unmap=True)
    await node.write(0, b"x" * CLUSTER)
    await node.discard(0, CLUSTER * 2)
    shown = bytes(await node.read(0, CLUSTER * 2))
    assert shown[:CLUSTER] in {b"x" * CLUSTER, bytes(CLUSTER)}
    assert shown[CLUSTER:] in {content[CLUSTER:], bytes(CLUSTER)}


async def test_a_discard_of_parts_of_clusters_keeps_them() -> None:
    node = await overlay(None, CLUSTER * 4, unmap=True)
    await node.write(0, b"x" * CLUSTER * 4)
    await node.discard(1, CLUSTER * 3 - 2)
    shown = await node.read(0, CLUSTER * 4)
    assert shown[:CLUSTER] == b"x" * CLUSTER
    assert shown[2 * CLUSTER :] == b"x" * CLUSTER * 2
    assert shown[CLUSTER : 2 * CLUSTER] == bytes(CLUSTER)


async def test_discards_reach_a_raw_file_only_with_unmap() -> None:
    for unmap in (False, True):
        node = await raw_node(MemoryStorage(b"x" * MIB), unmap=unmap)
        await node.discard(64 * KIB, 128 * KIB)
        assert bytes(await node.read(64 * KIB, 1)) == (b"\0" if unmap else b"x")
        assert await node.read(192 * KIB, 1) == b"x"


@pytest.mark.parametrize(("asked", "opened", "given"), [(a, o, a and o) for a in (False, True) for o in (False, True)])
async def test_space_is_given_back_only_when_both_sides_want_it(asked: bool, opened: bool, given: bool) -> None:
    seen: list[bool] = []

    class Watched(MemoryStorage):
        async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
            seen.append(unmap)

    node = await raw_node(Watched(size=MIB), unmap=opened)
    await node.zero(0, MIB, unmap=asked)
    assert seen == [given]


async def test_a_fast_zero_the_storage_refuses_is_not_done_slowly() -> None:
    class Slow(Yielding):
        async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
            if fast:
                raise OSError(errno.ENOTSUP, "slow")
            await super().zero(offset, length)

    storage = Slow(b"x" * 8192)
    node = await raw_node(storage)
    with pytest.raises(OSError, match="slow") as caught:
        await node.zero(0, 8192, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert storage.writes == []
    assert await node.read(0, 8192) == b"x" * 8192
    await node.zero(0, 8192)
    assert await node.read(0, 8192) == bytes(8192)


async def test_a_fast_zero_of_a_format_that_writes_zeroes_is_refused_untouched() -> None:
    with pytest.raises(OSError, match="cannot be zeroed faster") as caught:
        await Node([Scripted("DD", "a")]).zero(0, 8, fast=True)
    assert caught.value.errno == errno.ENOTSUP


# --- detect_zeroes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 17, b"\0" * 5000])
def test_zeroes_are_recognised(content: bytes) -> None:
    assert is_zero(memoryview(content))


@pytest.mark.parametrize("position", [0, 15, 16, 17, 4999])
def test_one_bit_anywhere_is_not_zero(position: int) -> None:
    content = bytearray(5000)
    content[position] = 128
    assert not is_zero(memoryview(content))


@pytest.mark.parametrize(
    ("mode", "opened", "zeroed"),
    [("off", True, []), ("on", True, [False]), ("unmap", True, [True]), ("unmap", False, [False])],
)
async def test_zeroes_written_are_zeroed_as_the_user_chose(mode: str, opened: bool, zeroed: list[bool]) -> None:
    seen: list[bool] = []

    class Watched(MemoryStorage):
        async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
            seen.append(unmap)
            await super().zero(offset, length)

    node = await raw_node(Watched(b"x" * 8192), detect_zeroes=mode, unmap=opened)
    await node.write(4096, bytes(4096))
    await node.write(0, bytes(4095) + b"y")
    assert seen == zeroed
    assert await node.read(0, 8192) == bytes(4095) + b"y" + bytes(4096)


# --- the guard of probed raw images ----------------------------------------------------------------------------------


async def _refused(node: Node, offset: int, data: bytes) -> None:
    with pytest.raises(RequestError, match="probed as raw") as caught:
        await node.write(offset, data)
    assert caught.value.errno == errno.EPERM


async def test_a_probed_raw_image_cannot_be_turned_into_another_format() -> None:
    storage = MemoryStorage(b"x" * 4096)
    node = await raw_node(storage, guard_probed_raw=True)
    assert node.submit_write(0, memoryview(QCOW2_HEADER), lambda error: None) == WRITE_WAIT
    await _refused(node, 0, QCOW2_HEADER)
    await _refused(node, 0, QCOW2_HEADER + b"more" * 500)
    await _refused(node, 64, b"\x7f\x10\xda\xbe")
    assert await node.read(0, 4096) == b"x" * 4096


async def test_nor_in_two_halves_nor_byte_by_byte() -> None:
    node = await raw_node(MemoryStorage(bytes(4096)), guard_probed_raw=True)
    await node.write(0, b"QF")
    await _refused(node, 2, b"I\xfb")
    await node.write(2, b"I")
    await _refused(node, 3, b"\xfb")
    assert await node.read(0, 4) == b"QFI\0"


async def test_nor_by_two_writes_at_once() -> None:
    node = await raw_node(Yielding(bytes(4096)), guard_probed_raw=True)
    results = await asyncio.gather(node.write(0, b"QF"), node.write(2, b"I\xfb"), return_exceptions=True)
    assert sum(isinstance(result, RequestError) for result in results) == 1
    assert bytes(await node.read(0, 4)) in {b"QF\0\0", b"\0\0I\xfb"}


async def test_nor_by_zeroing_or_discarding_what_hides_a_header() -> None:
    """A QED header begins with QED and a NUL."""
    node = await raw_node(MemoryStorage(bytes(MIB)), guard_probed_raw=True, unmap=True)
    await node.write(0, b"QEDx")
    await node.discard(3, 1)
    with pytest.raises(RequestError, match="probed as raw"):
        await node.zero(3, 1)
    with pytest.raises(RequestError, match="probed as raw"):
        await node.zero(3, MIB - 3, fast=True)
    assert await node.read(0, 4) == b"QEDx"
    await node.zero(0, 0)
    await node.zero(0, MIB)
    assert await node.read(0, MIB) == bytes(MIB)


@pytest.mark.parametrize("size", [513, 1000, 1024, 4096, 4097])
@pytest.mark.parametrize("length", [511, 512])
async def test_nor_into_a_fixed_vhd_by_its_last_bytes(size: int, length: int) -> None:
    footer = bytearray(struct.pack(">8s52xI", b"conectix", 2).ljust(length, b"\0"))
    struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
    node = await raw_node(MemoryStorage(b"\1" * size), guard_probed_raw=True, unmap=True)
    at = size - length
    await _refused(node, at, bytes(footer))
    await _refused(node, 1, (b"\1" * size + bytes(footer))[-size + 1 :])
    footer[100] = 1
    await node.write(at, bytes(footer))
    await _refused(node, at + 100, b"\0")
    with pytest.raises(RequestError, match="probed as raw"):
        await node.zero(at + 100, 1)
    await node.discard(at + 100, 1)
    await node.discard(0, size)
    assert await node.read(at, length) == footer


async def test_everything_else_is_written_to_a_probed_raw_image() -> None:
    node = await raw_node(MemoryStorage(bytes(8192)), guard_probed_raw=True)
    mbr = b"\xeb\x3c\x90".ljust(510, b"\1") + b"\x55\xaa"
    await node.write(0, mbr + b"rest")
    await node.write(512, QCOW2_HEADER)
    assert await node.read(0, 1024) == mbr + QCOW2_HEADER
    await node.write(100, b"z" * 1000)
    assert await node.read(0, 1100) == mbr[:100] + b"z" * 1000


async def test_an_image_declared_raw_takes_any_header() -> None:
    node = await raw_node(MemoryStorage(bytes(4096)))
    await node.write(0, QCOW2_HEADER)
    assert await node.read(0, 512) == QCOW2_HEADER


async def test_a_probed_raw_image_shorter_than_a_sector_is_guarded_too() -> None:
    node = await raw_node(MemoryStorage(bytes(8)), guard_probed_raw=True)
    await _refused(node, 0, QCOW2_HEADER[:8])
    await node.write(0, b"harmless")
    assert await node.read(0, 8) == b"harmless"
    assert node.size == 8
