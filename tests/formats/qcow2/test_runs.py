"""The whole mapping at once: parts of it, tables in memory, and the speed of large images."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED
from tests.formats.qcow2.engine import create, mapping, open_image, random_changes, run, write

FORMS = ["cluster_size=512", "cluster_size=4k", "extended_l2=on,cluster_size=16k"]


@pytest.mark.parametrize("options", FORMS)
async def test_a_part_is_what_the_whole_says_of_it(tmp_path: Path, options: str) -> None:
    size = (1 << 20) + 512
    driver = await open_image(create(tmp_path / "a.qcow2", size, options))
    await random_changes(driver, bytearray(size), 80, 1)
    whole = await mapping(driver)
    rng = random.Random(2)
    for _ in range(50):
        start = rng.randrange(size)
        end = rng.randrange(start, size) + 1
        expected = []
        for first, length, kind, host_offset in whole:
            low, high = max(first, start), min(first + length, end)
            if low < high:
                where = host_offset + low - first if host_offset >= 0 else -1
                expected.append((low, high - low, kind, where))
        found = await mapping(driver, start, end)
        assert _joined(found) == _joined(expected)
    assert await mapping(driver, 100, 100) == []
    await driver.close()


def _joined(runs: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Neighbours merged also where one batch of tables ended."""
    result: list[tuple[int, int, int, int]] = []
    for start, length, kind, host_offset in runs:
        if result:
            before = result[-1]
            follows = before[3] + before[1] if before[3] >= 0 else -1
            if (before[2], follows) == (kind, host_offset):
                result[-1] = (before[0], before[1] + length, kind, before[3])
                continue
        result.append((start, length, kind, host_offset))
    return result


@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on,cluster_size=16k"])
async def test_compressed_clusters_are_runs_of_their_own(tmp_path: Path, options: str) -> None:
    raw, path = tmp_path / "raw", tmp_path / "a.qcow2"
    raw.write_bytes(b"abcd" * (1 << 18))
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    driver = await open_image(path, read_only=True)
    runs = await mapping(driver)
    assert {(length, kind) for _, length, kind, _ in runs} == {(driver.cluster_size, COMPRESSED)}
    (part,) = await mapping(driver, driver.cluster_size + 1000, driver.cluster_size + 2000)
    assert part[:3] == (driver.cluster_size + 1000, 1000, COMPRESSED)
    await driver.close()


async def test_unflushed_changes_are_seen(tmp_path: Path) -> None:
    driver = await open_image(create(tmp_path / "a.qcow2", "4G"))
    await write(driver, 3 << 30, b"x" * 65536)
    runs = await mapping(driver)
    assert [run[:3] for run in _joined(runs)] == [
        (0, 3 << 30, UNALLOCATED),
        (3 << 30, 65536, DATA),
        ((3 << 30) + 65536, (1 << 30) - 65536, UNALLOCATED),
    ]
    await driver.close()


async def test_a_full_64_gib_image_takes_no_time_and_no_cache(tmp_path: Path) -> None:
    """1024 L2 tables; the limit is twenty times what they need of the processor."""
    path = create(tmp_path / "a.qcow2", "64G", "preallocation=metadata")
    driver = await open_image(path, read_only=True)
    begun = time.process_time()
    runs = _joined(await mapping(driver))
    assert time.process_time() - begun < 3
    assert sum(length for _, length, kind, _ in runs if kind == DATA) == 64 << 30
    assert not driver.cache.recent
    await driver.close()
