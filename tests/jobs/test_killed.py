"""The server is killed in the middle of a job: what is in the files then reads as it did before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdserve.storage.file import FileStorage
from tests.jobs.chains import chain, letters, make, opened
from tests.jobs.test_faults import CONTENT, JOBS, LAYERS, METHODS
from tests.support import images

STEP = int(os.environ.get("NBDSERVE_KILL_STEP", "6"))
"""Every how many operations on files the files are looked at; 1: before each of them."""


@pytest.mark.parametrize("kind", ["commit", "active commit", "stream", "rebase"])
async def test_every_moment_of_a_job_leaves_images_that_read_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "live"
    folder.mkdir()
    node = await chain(folder, *LAYERS)
    target = await make(folder / "target.qcow2")
    assert target.exists()
    moments: list[Path] = []
    count = 0

    def keep(name: str) -> None:
        real = getattr(FileStorage, name)

        async def method(storage: FileStorage, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            if name != "read_into":
                if count % STEP == 0:
                    moments.append(tmp_path / f"{count}-{name}")
                    shutil.copytree(folder, moments[-1])
                count += 1
            return await real(storage, *arguments, **options)

        monkeypatch.setattr(FileStorage, name, method)

    for name in METHODS:
        keep(name)
    for name in ("_try_write_memory", "_try_write_nowait"):
        monkeypatch.setattr(FileStorage, name, lambda *arguments: False)
    await JOBS[kind](node, node).result()
    moments.append(tmp_path / "end")
    shutil.copytree(folder, moments[-1])
    monkeypatch.undo()
    assert await letters(node) == CONTENT
    await node.close()
    assert len(moments) > 1
    for number, moment in enumerate(moments):
        assert await opened(moment / "2.qcow2") == CONTENT, moment.name
        if STEP == 1 or number % 3 == 0:
            for name in ("1.qcow2", "2.qcow2"):
                images.check(moment / name, leaks_allowed=True)
    if kind == "active commit":
        assert await opened(moments[-1] / "0.raw") == CONTENT
