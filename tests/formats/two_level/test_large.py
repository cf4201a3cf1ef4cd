"""Disks and tables at the far end of what the formats allow, in sparse files."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.extents import DATA
from nbdserve.formats.registry import driver_for
from nbdserve.storage.file import FileStorage
from nbdserve.units import MIB, TIB
from tests.support import images

LARGE = (
    ("qed", 2 * TIB, {}, True),
    ("qed", 2 * TIB, {"cluster_size": "4k", "table_size": "16"}, None),
    ("qed", 1 << 50, {"cluster_size": "64k", "table_size": "16"}, True),
    ("qed", (1 << 63) - 512, {"cluster_size": "64M", "table_size": "16"}, False),
    ("qed", 1 << 61, {"cluster_size": "1M", "table_size": "16"}, True),
    ("qcow", 2 * TIB, {}, True),
    ("qcow", 8 * TIB, {"backing_file": "b", "backing_fmt": "raw"}, False),
)
"""Format, size, options, and whether QEMU reads it; None: the tables are too small for that disk."""


@images.needs_qemu
@pytest.mark.parametrize(("fmt", "size", "options", "stock"), LARGE, ids=str)
async def test_both_ends_of_a_large_disk(
    tmp_path: Path, fmt: str, size: int, options: dict[str, str], stock: bool | None
) -> None:
    path = tmp_path / f"x.{fmt}"
    driver = driver_for(fmt)
    if stock is None:
        from nbdserve.errors import ConfigError  # noqa: PLC0415

        with pytest.raises(ConfigError, match="larger than"):
            driver.validate_create(size, options)
        return
    storage = await FileStorage.open(str(path), create=True)
    await driver.create(storage, size, options)
    await storage.close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    spec = ImageSpec(str(path), fmt, backing=None)
    node = await open_image(spec)
    assert time.process_time() - started < 2
    rng = random.Random(size)
    places = [0, size - 512, *(rng.randrange(size // 4096) * 4096 for _ in range(4))]
    for number, place in enumerate(places):
        await node.write(place, bytes([number + 1]) * 512)
    await node.close()
    node = await open_image(ImageSpec(str(path), fmt, backing=None, read_only=True))
    for number, place in enumerate(places):
        assert await node.read(place, 512) == bytes([number + 1]) * 512
    if fmt == "qed" or size <= 2 * TIB:
        result = await node.top.check()
        assert (result.corruptions, result.leaks) == (0, 0)
        assert result.allocated_clusters == len({place // node.top.cluster_size for place in places})
    around = places[-1] // node.top.cluster_size * node.top.cluster_size
    runs = [runs async for runs in node.top.iter_runs(max(0, around - 64 * MIB), min(size, around + 64 * MIB))]
    assert any(int(at) == around for part in runs for at in part.start[part.kind == DATA])
    await node.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB
    if stock:
        images.qemu_io(path, fmt, [f"read -P {number + 1} {place} 512" for number, place in enumerate(places)])
        if fmt == "qed" and options.get("cluster_size") != "1M":
            images.check(path, fmt)
