from __future__ import annotations

from pathlib import Path

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.jobs.convert import CommonBase, ConvertJob, layers_above
from nbdserve.jobs.copy import CopyOptions
from nbdserve.jobs.job import Job
from nbdserve.storage.memory import MemoryStorage
from tests.block.layers import Scripted, raw_node
from tests.support.images import needs_qemu, run


def layered(*layers: str) -> Node:
    """Layers of clusters of 4 bytes."""
    return Node([Scripted(clusters, chr(97 + number)) for number, clusters in enumerate(layers)])


async def result(job: Job, target: Node) -> bytes:
    await job.result()
    assert job.current_progress == job.total_progress
    return bytes(await target.read(0, target.size))


async def test_images_behind_each_other() -> None:
    target = await raw_node(MemoryStorage(b"t" * 32))
    job = ConvertJob("job", [layered("DZ.", "DDD"), layered("ZD")], target, CopyOptions(sparse=0))
    assert await result(job, target) == b"aaaa\0\0\0\0bbbb" + b"\0\0\0\0aaaa" + b"t" * 12


async def test_what_the_base_has_stays_its() -> None:
    target = await raw_node(MemoryStorage(b"t" * 20))
    base = CommonBase(above=1, size=12)
    job = ConvertJob("job", [layered("DZ.D.", "DDDDD")], target, CopyOptions(), base=base)
    assert await result(job, target) == b"aaaa\0\0\0\0ttttaaaabbbb"


async def test_zeroes_behind_the_end_of_the_base_need_no_writing() -> None:
    target = await raw_node(MemoryStorage(b"t" * 16))
    job = ConvertJob("job", [layered("DZZ.", "DD")], target, CopyOptions(), base=CommonBase(above=1, size=8))
    assert await result(job, target) == b"aaaa\0\0\0\0tttttttt"


async def test_a_window() -> None:
    target = await raw_node(MemoryStorage(b"t" * 12))
    job = ConvertJob("job", [layered("DZ.D.", "DDDDD")], target, CopyOptions(sparse=0), window=(2, 10))
    assert await result(job, target) == b"aa\0\0\0\0bbtttt"


@needs_qemu
async def test_the_common_base_is_found_by_its_identity(tmp_path: Path) -> None:
    below: list[str] = []
    for name in ("base", "middle", "top"):
        run("qemu-img", "create", "-q", "-f", "qcow2", *below, tmp_path / name, "1M")
        below = ["-b", name, "-F", "qcow2"]
    (tmp_path / "link").symlink_to("base")
    node = await open_image(ImageSpec(str(tmp_path / "top"), read_only=True))
    above = {}
    for name in ("base", "link", "middle", "top"):
        status = (tmp_path / name).stat()
        above[name] = layers_above(node, (status.st_dev, status.st_ino))
    await node.close()
    assert above == {"base": 2, "link": 2, "middle": 1, "top": 1}
