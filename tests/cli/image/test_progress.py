from __future__ import annotations

import asyncio

import pytest

from nbdserve.cli.image.progress import run_job
from tests.jobs.examples import Scripted


class Counting(Scripted):
    async def run(self) -> None:
        self.total_progress = 1 << 20
        for _ in range(4):
            await asyncio.sleep(0.03)
            self.current_progress += 1 << 18


async def test_a_bar_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    await run_job(Counting(), "Counting", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Counting" in captured.err
    assert "100%" in captured.err


async def test_nothing_is_shown_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    await run_job(Counting(), "Counting", progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [False, True])
async def test_the_error_of_the_job(progress: bool) -> None:
    job = Scripted(fails_in=["run"])
    job.go_on.set()
    with pytest.raises(OSError, match="run went wrong"):
        await run_job(job, "Failing", progress=progress)


@pytest.mark.parametrize("progress", [False, True])
async def test_an_interrupted_job_cleans_up(progress: bool) -> None:
    job = Scripted()
    running = asyncio.create_task(run_job(job, "Working", progress=progress))
    await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert job.calls == ["abort", "clean"]
