"""Rebase: what two backing chains do not have alike is copied, and the header is changed last."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import JobError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.base import BackingReference
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.jobs.rebase import Rebase
from tests.jobs.chains import SIZE, UNIT, chain, letters, make, opened
from tests.support import images


async def test_only_what_differs_is_copied(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a 5a", "qcow2 0t")
    await make(tmp_path / "new.raw", "raw", 4 * UNIT)
    base = await open_image(ImageSpec(str(tmp_path / "new.raw"), "raw"))
    for unit, letter in ((0, "n"), (1, "a"), (2, "n"), (3, "n")):
        await base.write(unit * UNIT, letter.encode() * UNIT)
    await Rebase("job", node, base, BackingReference("new.raw", "raw")).result()
    kinds = []
    for unit in range(7):
        run = node.top.lookup(unit * UNIT, UNIT)
        assert run is not None
        kinds.append(run[0])
    assert kinds == [DATA, UNALLOCATED, DATA, ZERO, UNALLOCATED, DATA, UNALLOCATED]
    await node.close()
    await base.close()
    assert await opened(tmp_path / "1.qcow2") == "taa..a"


async def test_zeroes_of_the_old_chain_hide_the_new_one_in_any_part_of_a_cluster(tmp_path: Path) -> None:
    for fmt in ("qcow2", "qed"):
        folder = tmp_path / fmt
        folder.mkdir()
        node = await chain(folder, "raw", f"{fmt} 9t")
        await make(folder / "new.raw", "raw")
        base = await open_image(ImageSpec(str(folder / "new.raw"), "raw"))
        await base.write(UNIT - 512, b"n" * (2 * UNIT + 1024))
        await Rebase("job", node, base, BackingReference("new.raw", "raw")).result()
        await node.close()
        await base.close()
        assert await opened(folder / f"1.{fmt}") == ".........t"


@pytest.mark.parametrize("fmt", ["qcow2", "qcow", "qed", "vmdk", "vpc", "vhdx"])
@pytest.mark.parametrize("size", [SIZE // 2 + 512, SIZE, 2 * SIZE])
async def test_a_disk_without_a_backing_file_gets_one(tmp_path: Path, fmt: str, size: int) -> None:
    """What read as zeroes has to hide it."""
    base = await make(tmp_path / f"base.{fmt}", fmt, size)
    node = await open_image(ImageSpec(str(base), fmt))
    await node.write(0, b"n" * size)
    await node.close()
    path = await make(tmp_path / f"top.{fmt}", fmt)
    node = await open_image(ImageSpec(str(path), fmt, gets_backing=True))
    await node.write(UNIT, b"a" * UNIT)
    below = await open_image(ImageSpec(str(base), fmt, read_only=True))
    await Rebase("job", node, below, BackingReference(base.name, fmt)).result()
    await node.close()
    await below.close()
    backing = {"qed": ImageSpec("", fmt), "qcow": ImageSpec("", fmt)}.get(fmt, "header")
    node = await open_image(ImageSpec(str(path), fmt, read_only=True, backing=backing))
    assert len(node.layers) == 2
    assert await letters(node) == ".a"
    await node.close()


@pytest.mark.parametrize("fmt", ["vmdk", "vpc", "vhdx"])
@pytest.mark.parametrize("size", [SIZE // 2 + 512, SIZE, 2 * SIZE])
async def test_formats_that_know_the_identity_of_their_backing_file(tmp_path: Path, fmt: str, size: int) -> None:
    node = await chain(tmp_path, f"{fmt} 0a 1a 5a 12a", f"{fmt} 0t 1z", f"{fmt} 3t")
    await node.write(10 * UNIT + 512, b"s" * 512)
    base = await open_image(ImageSpec(str(await make(tmp_path / f"new.{fmt}", fmt, size)), fmt))
    await base.write(0, b"n" * size)
    await base.flush()
    before = await node.read(0, node.size)
    await Rebase("job", node, base, BackingReference(f"new.{fmt}", fmt)).result()
    await node.close()
    await base.close()
    for number in range(2):
        (tmp_path / f"{number}.{fmt}").unlink()
    node = await open_image(ImageSpec(str(tmp_path / f"2.{fmt}"), fmt))
    assert [Path(layer.path).name for layer in node.layers] == [f"2.{fmt}", f"new.{fmt}"]
    assert await node.read(0, node.size) == before
    await Rebase("job", node, None, None).result()
    await node.close()
    (tmp_path / f"new.{fmt}").unlink()
    node = await open_image(ImageSpec(str(tmp_path / f"2.{fmt}"), fmt, read_only=True))
    assert await node.read(0, node.size) == before
    assert not (await node.top.check()).corruptions
    await node.close()
    if images.HAVE_QEMU:
        assert images.raw_content(tmp_path / f"2.{fmt}", fmt, tmp_path) == before


async def test_no_backing_file_any_more(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a", "qcow2 1b", "qcow2 2c")
    job = Rebase("job", node, None, None)
    await job.result()
    assert job.current_progress == job.total_progress == SIZE
    await node.close()
    (tmp_path / "0.raw").unlink()
    (tmp_path / "1.qcow2").unlink()
    assert await opened(tmp_path / "2.qcow2") == "abc"


@pytest.mark.parametrize("method", ["write", "set_backing"])
async def test_a_failure_leaves_the_old_backing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    node = await chain(tmp_path, "raw 0a 4a", "qcow2 1b")

    async def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node if method == "write" else Qcow2Driver, method, fail)
    with pytest.raises(OSError, match="No space"):
        await Rebase("job", node, None, None).result()
    assert not node.busy_with
    assert await letters(node) == "ab..a"
    await node.close()
    assert await opened(tmp_path / "1.qcow2") == "ab..a"


async def test_a_format_without_backing_files(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    with pytest.raises(JobError, match="Could not change the backing file to 'x': Operation not supported"):
        Rebase("job", node, None, BackingReference("x", "raw"))
    await node.close()
