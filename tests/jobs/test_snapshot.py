"""External snapshots: one moment on several disks, or nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError, JobError
from nbdserve.jobs.commit import ActiveCommit
from nbdserve.jobs.snapshot import create_overlay, name_from, snapshot
from tests.jobs.chains import SIZE, UNIT, chain, letters, make, opened


async def test_what_follows_goes_into_the_new_layer(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a", "qcow2 1b")
    overlay = await create_overlay(str(tmp_path / "new.qcow2"), "qcow2", node)
    await snapshot([(node, overlay)])
    await node.write(0, b"c" * UNIT)
    assert await letters(node) == "cb"
    assert [layer.read_only for layer in node.layers] == [False, True, True]
    job = ActiveCommit("job", node, auto_complete=True)
    await job.result()
    assert [Path(layer.path).name for layer in node.layers] == ["1.qcow2", "0.raw"]
    assert await letters(node) == "cb"
    await node.close()
    assert await opened(tmp_path / "new.qcow2") == "cb"


async def test_the_layer_below_cannot_be_closed_well(tmp_path: Path) -> None:
    """It was flushed, so the snapshot holds, and clients read through it."""
    node = await chain(tmp_path, "raw 0a", "qcow2 1b")
    overlay = await create_overlay(str(tmp_path / "new.qcow2"), "qcow2", node)
    below = node.top

    async def fail() -> None:
        await type(below).close(below)
        raise OSError(errno.EIO, "lost")

    below.close = fail  # type: ignore[method-assign]
    await snapshot([(node, overlay)])
    assert [layer.read_only for layer in node.layers] == [False, True, True]
    await node.write(0, b"c" * UNIT)
    assert await letters(node) == "cb"
    await node.close()


async def test_several_or_none(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    nodes = [await chain(tmp_path / name, "raw 0a") for name in ("one", "two")]
    overlays = [await create_overlay(str(tmp_path / f"{n}.qcow2"), "qcow2", node) for n, node in enumerate(nodes)]

    async def fail() -> None:
        raise OSError(5, "lost")

    real, nodes[1].top.flush = nodes[1].top.flush, fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="lost"):
        await snapshot(list(zip(nodes, overlays, strict=True)))
    assert [len(node.layers) for node in nodes] == [1, 1]
    nodes[1].top.flush = real  # type: ignore[method-assign]
    await snapshot(list(zip(nodes, overlays, strict=True)))
    assert [len(node.layers) for node in nodes] == [2, 2]
    for node in nodes:
        await node.close()


async def test_what_cannot_be_an_overlay(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    other = await chain(tmp_path, "qcow2", sizes=(2 * SIZE,))
    with pytest.raises(JobError, match="bytes"):
        await snapshot([(node, other.top)])
    node.busy_with = "backup"
    with pytest.raises(JobError, match="in use by block job: backup"):
        await snapshot([(node, node.top)])
    await node.close()
    await other.close()


async def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    path = tmp_path / "new.parallels"
    with pytest.raises(ConfigError, match="backing file"):
        await create_overlay(str(path), "parallels", node)
    assert not path.exists()
    with pytest.raises(ConfigError):
        await create_overlay(str(tmp_path / "new.qcow2"), "qcow2", node, options={"cluster_size": "5"})
    assert not (tmp_path / "new.qcow2").exists()
    with pytest.raises(ImageError, match=r"0\.raw"):
        await create_overlay(str(tmp_path / "0.raw"), "qcow2", node)
    assert await letters(node) == "a"
    await make(tmp_path / "there.qcow2")
    overlay = await create_overlay(str(tmp_path / "there.qcow2"), "qcow2", node)
    await overlay.close()
    await node.close()


def test_names_in_headers(tmp_path: Path) -> None:
    assert name_from(str(tmp_path / "a"), str(tmp_path / "b")) == "b"
    assert name_from(str(tmp_path / "x" / "a"), str(tmp_path / "b")) == str(tmp_path / "b")
