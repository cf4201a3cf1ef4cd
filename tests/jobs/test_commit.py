"""Commit: into a layer below, from the middle of a chain or from its top."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from nbdserve.block.reopening import reopen
from nbdserve.errors import ConfigError, ImageError, JobError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.jobs.commit import ActiveCommit, Commit
from nbdserve.jobs.status import JobStatus
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB
from tests.jobs.chains import SIZE, UNIT, begin, chain, letters, opened, until


async def test_layers_in_the_middle_go_into_the_base_and_out_of_the_chain(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a 3a", "qcow2 1b 2b 3z", "qcow2 2c", "qcow2 0d")
    assert await letters(node) == "dbc"
    await Commit("job", node, 1, 3).result()
    assert [layer.name for layer in node.layers] == ["qcow2", "raw"]
    assert await letters(node) == "dbc"
    assert node.layers[1].read_only
    await node.write(5 * UNIT, b"e" * UNIT)
    await node.close()
    assert await opened(tmp_path / "0.raw") == "abc"
    assert await opened(tmp_path / "3.qcow2") == "dbc..e"
    top = await Qcow2Driver.open(await FileStorage.open(str(tmp_path / "3.qcow2"), read_only=True), {}, read_only=True)
    assert top.backing is not None
    assert (top.backing.name, top.backing.format) == ("0.raw", "raw")
    await top.close()


IDENTITY = ["vmdk", "vpc", "vhdx"]
"""Formats whose images know their backing file by more than its name, and refuse it when it was written to."""


@pytest.mark.parametrize("fmt", IDENTITY)
async def test_the_layer_above_takes_the_base_that_was_written_to(tmp_path: Path, fmt: str) -> None:
    node = await chain(tmp_path, f"{fmt} 0a 1a 2a", f"{fmt} 1b", f"{fmt} 2c", f"{fmt} 0d")
    await Commit("job", node, 2, 3).result()
    assert [Path(layer.path).name for layer in node.layers] == [f"{number}.{fmt}" for number in (3, 2, 0)]
    assert all(layer.read_only for layer in node.layers[1:])
    assert await letters(node) == "dbc"
    await node.close()
    assert await opened(tmp_path / f"3.{fmt}") == "dbc"
    assert await opened(tmp_path / f"0.{fmt}") == "aba"


@pytest.mark.parametrize("base", [1, 2])
@pytest.mark.parametrize("fmt", IDENTITY)
async def test_a_chain_that_stays_takes_the_base_that_was_written_to(tmp_path: Path, fmt: str, base: int) -> None:
    node = await chain(tmp_path, f"{fmt} 0a 1a 2a", f"{fmt} 1b", f"{fmt} 2c")
    await ActiveCommit("job", node, base, auto_complete=True, pivot=False).result()
    assert len(node.layers) == 3
    assert await letters(node) == "abc"
    await node.close()
    assert await opened(tmp_path / f"2.{fmt}") == "abc"
    assert await opened(tmp_path / f"{2 - base}.{fmt}") == "abc"


@pytest.mark.parametrize("kind", ["commit", "active commit"])
async def test_what_is_not_needed_any_more_may_fail_to_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    node = await chain(tmp_path, "qcow2 0a 1a", "qcow2 1b", "qcow2 2c", "qcow2 3d")
    closed = []
    for layer in node.layers[1:3] if kind == "commit" else node.layers[:3]:

        async def fail(layer: FormatDriver = layer) -> None:
            await type(layer).close(layer)
            closed.append(layer)
            raise OSError(errno.EIO, "lost")

        monkeypatch.setattr(layer, "close", fail)
    await (Commit("job", node, 1, 3) if kind == "commit" else ActiveCommit("job", node, 3, auto_complete=True)).result()
    assert len(closed) == (2 if kind == "commit" else 3)
    assert await letters(node) == "abcd"
    await node.close()


async def test_a_base_that_cannot_be_closed_well_is_read_nevertheless(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a", "qcow2 1b")
    job = begin(ActiveCommit("job", node))
    await until(job, JobStatus.READY)
    base = node.layers[1]

    async def fail() -> None:
        await type(base).close(base)
        raise OSError(errno.EIO, "lost")

    base.close = fail  # type: ignore[method-assign]
    job.cancel(force=True)
    await job.wait()
    assert node.layers[1] is not base
    assert node.layers[1].read_only
    assert await letters(node) == "ab"
    await ActiveCommit("job", node, auto_complete=True).result()
    assert await letters(node) == "ab"
    await node.close()


async def test_the_layer_above_is_opened_for_its_header_alone(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a", "qcow2 1b", "qcow2 2c", "qcow2 3d")
    await Commit("job", node, 2, 3).result()
    assert [Path(layer.path).name for layer in node.layers] == ["3.qcow2", "2.qcow2", "0.qcow2"]
    assert [layer.read_only for layer in node.layers] == [False, True, True]
    await node.close()
    assert await opened(tmp_path / "2.qcow2") == "abc"


async def test_the_base_grows_and_a_layer_that_was_shorter_hides_it(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a 3a", "qcow2 0b", "qcow2 1c", sizes=(4 * UNIT, 2 * UNIT, 4 * UNIT))
    assert await letters(node) == "bc"
    await Commit("job", node, 1, 2).result()
    assert await letters(node) == "bc"
    await node.close()
    node = await chain(tmp_path, "raw 0a", "qcow2 3b", "qcow2 1c", sizes=(UNIT, 4 * UNIT, 4 * UNIT))
    await Commit("job", node, 1, 2).result()
    assert await letters(node) == "ac.b"
    await node.close()


async def test_the_top_layer_is_committed_and_the_base_takes_its_place(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a 1a", "qcow2 1b", "qcow2 2c")
    job = begin(ActiveCommit("job", node, 2))
    await until(job, JobStatus.READY)
    await node.write(3 * UNIT, b"d" * UNIT)
    await node.zero(0, UNIT)
    assert job.status is JobStatus.READY
    job.complete()
    await job.wait()
    assert job.error is None
    assert [Path(layer.path).name for layer in node.layers] == ["0.qcow2"]
    assert await letters(node) == ".bcd"
    await node.write(4 * UNIT, b"e" * UNIT)
    assert not node.busy_with
    await node.close()
    assert await opened(tmp_path / "0.qcow2") == ".bcde"


@pytest.mark.parametrize("ready", [False, True])
async def test_cancelled_the_chain_is_as_it_was(tmp_path: Path, ready: bool) -> None:
    node = await chain(tmp_path, "qcow2 0a", "qcow2 1b", "qcow2 2c")
    job = ActiveCommit("job", node, 1, speed=0 if ready else UNIT)
    begin(job)
    await until(job, JobStatus.READY if ready else JobStatus.RUNNING)
    await node.write(3 * UNIT, b"d" * UNIT)
    job.cancel(force=True)
    await job.wait()
    assert [Path(layer.path).name for layer in node.layers] == ["2.qcow2", "1.qcow2", "0.qcow2"]
    assert [layer.read_only for layer in node.layers] == [False, True, True]
    assert await letters(node) == "abcd"
    await node.close()


async def test_a_layer_is_opened_again_also_when_the_caller_is_cancelled(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a", "qcow2 1b")
    base = node.layers[1]
    close, closing, go_on = base.close, asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        await close()
        closing.set()
        await go_on.wait()

    base.close = slow  # type: ignore[method-assign]

    async def again() -> None:
        async with node.drained():
            await reopen(node, 1, read_only=False)

    task = asyncio.create_task(again())
    await closing.wait()
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await letters(node) == "ab"
    assert not node.layers[1].read_only
    await node.close()


async def test_who_cannot_be_the_base_stays_as_it_was(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a", "qcow2 1b", "qcow2 2c")
    other = await FileStorage.open(str(tmp_path / "0.raw"), read_only=True)
    with pytest.raises(ImageError, match=r"0\.raw"):
        await Commit("job", node, 1, 2).result()
    assert await letters(node) == "abc"
    assert node.layers[2].read_only
    await other.close()
    await Commit("job", node, 1, 2).result()
    assert await letters(node) == "abc"
    await node.close()


async def test_a_full_base_fails_the_job_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await chain(tmp_path, "raw 0a", "qcow2 1b 2b", "qcow2 3c")

    async def full(storage: FileStorage, offset: int, data: bytes) -> None:
        if storage.path.endswith("0.raw"):
            raise OSError(errno.ENOSPC, "No space left on device")
        await real(storage, offset, data)

    real = FileStorage.write
    monkeypatch.setattr(FileStorage, "write", full)
    monkeypatch.setattr(FileStorage, "_try_write_memory", lambda *arguments: False)
    monkeypatch.setattr(FileStorage, "_try_write_nowait", lambda *arguments: False)
    with pytest.raises(OSError, match="No space"):
        await Commit("job", node, 1, 2).result()
    assert [Path(layer.path).name for layer in node.layers] == ["2.qcow2", "1.qcow2", "0.raw"]
    assert await letters(node) == "abbc"
    job = begin(Commit("job", node, 1, 2, on_error="stop"))
    await until(job, JobStatus.PAUSED)
    assert job.io_status == "nospace"
    monkeypatch.setattr(FileStorage, "write", real)
    job.resume()
    await job.wait()
    assert job.error is None
    assert await letters(node) == "abbc"
    await node.close()
    assert await opened(tmp_path / "0.raw") == "abb"


async def test_one_job_at_a_time_and_no_resize(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a", "qcow2 1b")
    job = ActiveCommit("job", node)
    with pytest.raises(JobError, match="is busy: block device is in use by block job: commit"):
        ActiveCommit("other", node)
    with pytest.raises(ConfigError, match="is busy"):
        await node.resize(2 * SIZE)
    begin(job)
    await until(job, JobStatus.READY)
    job.cancel(force=True)
    await job.wait()
    assert not node.busy_with
    await node.close()


@pytest.mark.parametrize(("top", "base"), [(0, 1), (1, 1), (2, 1), (1, 3)])
async def test_layers_that_make_no_sense(tmp_path: Path, top: int, base: int) -> None:
    node = await chain(tmp_path, "qcow2", "qcow2", "qcow2")
    with pytest.raises(JobError):
        Commit("job", node, top, base)
    assert not node.busy_with
    await node.close()
    alone = await chain(tmp_path, "qcow2")
    with pytest.raises(JobError, match="backing file"):
        ActiveCommit("job", alone)
    await alone.close()


async def test_progress_reaches_the_total(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw", "qcow2 1b 2b 7c", "qcow2")
    job = Commit("job", node, 1, 2)
    await job.result()
    assert job.current_progress == job.total_progress == 3 * 64 * KIB
    await node.close()
