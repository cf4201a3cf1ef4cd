"""``-p`` is printed as qemu-img prints it."""

from __future__ import annotations

import pytest

from nbdserve.cli.image.percent import run_shown
from tests.jobs.examples import Scripted


async def test_the_percentage_is_printed_over_itself(capsys: pytest.CaptureFixture[str]) -> None:
    job = Scripted()
    job.go_on.set()
    await run_shown(job, progress=True)
    printed = capsys.readouterr().out
    assert printed.startswith("    (0.00/100%)\r")
    assert printed.endswith("    (100.00/100%)\r\n")


async def test_a_failure_is_raised_and_nothing_printed_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        job = Scripted(fails_in=["run"])
        job.go_on.set()
        with pytest.raises(OSError, match="run went wrong"):
            await run_shown(job, progress=progress)
        assert ("100.00" in capsys.readouterr().out) is False
    job = Scripted()
    job.go_on.set()
    await run_shown(job, progress=False)
    assert capsys.readouterr().out == ""
