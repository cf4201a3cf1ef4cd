"""Every operation of the storage fails once, or for good: errors are clean, and the image survives them."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from pathlib import Path

import pytest

from nbdserve.errors import RequestError
from tests.support import images
from tests.support.faults import Faults, FaultyStorage
from tests.support.geometries import CRASH_GEOMETRIES, KITS, Geometry, Image, build, judge
from tests.support.model import ModelDisk
from tests.support.recording import ByteStorage
from tests.support.workload import Mix, Workload, read_all

CASES = int(os.environ.get("NBDSERVE_FAULTS", "6"))
"""Fault positions tried per geometry."""
SEED = int(os.environ.get("NBDSERVE_SEED", "1"))
MIX = Mix(largest=64 << 10, in_flight=3)
OPERATIONS = 40

pytestmark = images.needs_qemu


def _expected(error: BaseException) -> bool:
    return isinstance(error, OSError | RequestError)


async def _work(image: Image, faults: Faults, seed: int) -> None:
    """Work, fail, work on, close as far as possible; then reopen what is there and judge it."""
    model = ModelDisk(image.size, image.guest)
    stores = [FaultyStorage(content, faults) for content in image.contents]
    try:
        node = await image.open(stores)
    except (OSError, RequestError):
        assert faults.fired
        await _judge(image, stores, model)
        return
    workload = Workload(node, model, random.Random(seed), mix=MIX, on_error=_expected)
    await workload.run(OPERATIONS)
    assert workload.errors == 0 or faults.fired
    dead = any(store.dead for store in stores)
    faults.armed = False
    await workload.verify()
    if dead:
        # A lost flush cannot be retried: nothing is promised stable any more on any connection.
        with pytest.raises((OSError, RequestError)):
            await node.write(0, bytes(512), fua=True)
        with pytest.raises((OSError, RequestError)):
            await node.flush()
    else:
        # The trouble is over: what works on is right, and can be made stable.
        await workload.run(10)
        assert workload.errors == 0 or faults.fired
        begun = model.begin_flush()
        await node.flush()
        model.flushed(begun)
        await workload.verify()
    try:
        await node.close()
    except (OSError, RequestError):
        assert dead
    await _judge(image, stores, model, last_word=dead)


async def _judge(image: Image, stores: list[FaultyStorage], model: ModelDisk, *, last_word: bool = False) -> None:
    """Content as promised, metadata sound or leaking, by our own check and by qemu-img's."""
    if last_word:
        operation = model.issue("write", 0, 512)
        operation.values[0] = (*operation.values[0], 0)
        model.complete(operation, failed=True)
    node = await image.open([ByteStorage(store.content) for store in stores], read_only=True)
    content = await read_all(node, model.size)
    model.check_crash(content)
    if node.top.can("check"):
        result = await node.top.check()
        marks = KITS[image.geometry.fmt].crash_marks
        assert result.corruptions <= marks and not result.check_errors, result.messages[:5]
    with tempfile.TemporaryDirectory(dir=images.SCRATCH) as name:
        path = image.write_to(Path(name), [store.content for store in stores])
        judge(image.geometry, path, Path(name), content)


async def _operations_of(image: Image, kinds: frozenset[str] | None, seed: int) -> int:
    """How many storage operations the work has when nothing fails."""
    counter = Faults(-1, errno.EIO, kinds=kinds, seed=seed)
    await _work(image, counter, seed)
    return counter.count


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
async def test_a_failing_operation_does_no_harm(geometry: Geometry) -> None:
    image, rng = build(geometry), random.Random(f"{geometry.name}/{SEED}")
    total = await _operations_of(image, None, SEED)
    for case in range(CASES):
        at = rng.randrange(total)
        code = rng.choice((errno.EIO, errno.ENOSPC, errno.EDQUOT))
        forever = rng.random() < 0.4
        faults = Faults(at, code, forever=forever, seed=case)
        try:
            await _work(image, faults, SEED)
        except (Exception, AssertionError) as error:
            raise AssertionError(
                f"operation {at} of {total} failing with {code}, {forever=}, {case=}: {error}"
            ) from error


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES[::3], ids=str)
async def test_a_failing_flush_is_final(geometry: Geometry) -> None:
    image, flushes = build(geometry), frozenset({"flush"})
    total = await _operations_of(image, flushes, SEED)
    for at in range(0, total, max(1, total // max(1, CASES // 2))):
        faults = Faults(at, errno.EIO, kinds=flushes)
        try:
            await _work(image, faults, SEED)
        except (Exception, AssertionError) as error:
            raise AssertionError(f"flush {at} of {total} failing: {error}") from error


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES[1::3], ids=str)
async def test_a_failing_read_fails_one_request(geometry: Geometry) -> None:
    image, reads, rng = build(geometry), frozenset({"read"}), random.Random(f"{geometry.name}/{SEED}")
    total = await _operations_of(image, reads, SEED)
    for case in range(CASES // 2):
        at = rng.randrange(max(1, total))
        faults = Faults(at, errno.EIO, kinds=reads, forever=rng.random() < 0.3, seed=case)
        try:
            await _work(image, faults, SEED)
        except (Exception, AssertionError) as error:
            raise AssertionError(f"read {at} of {total} failing, {faults.forever=}, {case=}: {error}") from error
