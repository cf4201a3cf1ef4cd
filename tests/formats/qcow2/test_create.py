from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.create import create_qcow2, parse_options, plan_layout
from nbdserve.storage.memory import MemoryStorage
from tests.support.images import create, needs_qemu, run


async def image(size: int, **options: str) -> bytes:
    storage = MemoryStorage()
    data = MemoryStorage() if "data_file" in options else None
    await create_qcow2(storage, size, options, data_file_storage=data)
    return bytes(await storage.read(0, storage.size))


@given(
    size=st.integers(0, 1 << 45),
    cluster_bits=st.integers(9, 21),
    order=st.integers(0, 6),
    preallocate=st.booleans(),
)
def test_the_refcount_structure_covers_all_clusters_and_no_block_too_many(
    size: int, cluster_bits: int, order: int, preallocate: bool
) -> None:
    try:
        plan = plan_layout(size, cluster_bits=cluster_bits, refcount_order=order, preallocate=preallocate)
    except ConfigError:
        return
    cluster = 1 << cluster_bits
    assert plan.refcount_blocks * plan.counts_per_block >= plan.clusters
    assert plan.refcount_table_clusters * cluster // 8 >= plan.refcount_blocks
    parts = [
        (0, 1),
        (plan.refcount_table_offset, plan.refcount_table_clusters),
        (plan.refcount_blocks_offset, plan.refcount_blocks),
        (plan.l2_offset, plan.l2_tables),
        (plan.data_offset, plan.data_clusters),
    ]
    if plan.l1_entries:
        parts.insert(3, (plan.l1_offset, -(-plan.l1_entries * 8 // cluster)))
    end = 0
    for offset, clusters in parts:
        assert offset == end
        end += clusters * cluster
    assert end == plan.end_offset
    # One block less would not do for what is left without it.
    assert plan.refcount_blocks == 1 or (plan.refcount_blocks - 1) * plan.counts_per_block < plan.clusters


def test_a_disk_beyond_the_l1_limit_is_refused_with_its_size() -> None:
    plan_layout(128 << 30, cluster_bits=9)
    with pytest.raises(ConfigError, match="L1 table of 33554440 bytes"):
        plan_layout((128 << 30) + 512, cluster_bits=9)


def test_preallocation_beyond_the_refcount_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="refcount table"):
        plan_layout(100 << 30, cluster_bits=9, refcount_order=6, preallocate=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cluster_size": "256"}, "power of two"),
        ({"cluster_size": "4M"}, "power of two"),
        ({"cluster_size": "3000"}, "power of two"),
        ({"cluster_size": "x"}, "cluster_size"),
        ({"refcount_bits": "3"}, "power of two"),
        ({"refcount_bits": "128"}, "64"),
        ({"compat": "1.2"}, "compat=1.2"),
        ({"compat": "0.10", "refcount_bits": "8"}, "refcount_bits"),
        ({"compat": "v2", "lazy_refcounts": "on"}, "lazy_refcounts"),
        ({"compat": "v2", "extended_l2": "on"}, "extended_l2"),
        ({"compat": "v2", "data_file": "x"}, "data_file"),
        ({"compat": "v2", "compression_type": "zstd"}, "compression_type"),
        ({"compression_type": "lz4"}, "lz4"),
        ({"extended_l2": "on", "cluster_size": "8k"}, "16384"),
        ({"data_file_raw": "on"}, "needs data_file"),
        ({"backing_file": "b"}, "backing_fmt"),
        ({"backing_fmt": "raw"}, "backing_file"),
        ({"backing_file": "b", "backing_fmt": "raw", "data_file": "d", "data_file_raw": "on"}, "exclude"),
        ({"backing_file": "b", "backing_fmt": "raw", "preallocation": "metadata"}, "extended_l2"),
        ({"preallocation": "some"}, "preallocation=some"),
        ({"lazy_refcounts": "maybe"}, "lazy_refcounts=maybe"),
        ({"encryption": "on"}, "encrypted"),
        ({"encrypt.format": "luks"}, "encrypted"),
        ({"nope": "1"}, "nope"),
    ],
)
async def test_bad_options_are_refused_by_name_and_nothing_is_touched(options: dict[str, str], problem: str) -> None:
    storage = MemoryStorage()
    await storage.write(0, b"precious")
    with pytest.raises(ConfigError, match=problem):
        await create_qcow2(storage, 1 << 20, options)
    assert await storage.read(0, 8) == b"precious"


async def test_a_backing_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="header needs"):
        await image(1 << 20, backing_file="b" * 500, backing_fmt="raw", cluster_size="512")


def test_yes_and_no_are_understood() -> None:
    assert parse_options({"lazy_refcounts": "yes"}).lazy_refcounts
    assert not parse_options({"lazy_refcounts": "n"}).lazy_refcounts


class HeaderLast(MemoryStorage):
    """Notes whether the magic was there at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[bool] = []

    async def flush(self) -> None:
        self.flushed.append((await self.read(0, 4)) == layout.MAGIC)
        await super().flush()


async def test_the_header_is_written_behind_a_barrier() -> None:
    storage = HeaderLast()
    await create_qcow2(storage, 1 << 30, {"preallocation": "metadata"})
    assert storage.flushed == [False, True]


@needs_qemu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": "512"},
        {"cluster_size": "4k"},
        {"cluster_size": "8k"},
        {"cluster_size": "2M", "compression_type": "zstd", "lazy_refcounts": "on"},
        {"extended_l2": "on", "cluster_size": "16k"},
        {"refcount_bits": "1"},
        {"refcount_bits": "64"},
        {"backing_file": "base.raw", "backing_fmt": "raw"},
    ],
)
async def test_the_image_is_what_qemu_img_makes(options: dict[str, str], tmp_path: Path) -> None:
    """Byte for byte; only the last cluster, which QEMU leaves incomplete, is filled up with zeroes."""
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    theirs = tmp_path / "q.qcow2"
    listed = ",".join(f"{name}={value}" for name, value in options.items())
    create(theirs, 5 << 20, options=listed)
    ours = await image(5 << 20, **options)
    assert ours.rstrip(b"\0") == theirs.read_bytes().rstrip(b"\0")


@needs_qemu
@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": "512", "refcount_bits": "1"},
        {"extended_l2": "on"},
        {"cluster_size": "4k", "refcount_bits": "2"},
    ],
)
async def test_preallocated_images_are_clean_and_fully_allocated(
    preallocation: str, options: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "p.qcow2"
    path.write_bytes(await image(3_000_001, preallocation=preallocation, **options))
    assert "100.00% allocated, 0.00% fragmented" in run("qemu-img", "check", path)
    run("qemu-io", "-c", "read -P 0 0 3000320", "-c", "write -P 7 1M 64k", "-c", "read -P 7 1M 64k", path)
    run("qemu-img", "check", path)
