"""The server is killed in the middle of a job: what is in the files then reads as it did before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from tests.jobs.chains import chain, letters, make, opened
from tests.jobs.faults import CONTENT, LAYERS, OPERATIONS, READS, SIZE, Bench, intercepted
from tests.support import images

STEP = int(os.environ.get("NBDSERVE_KILL_STEP", "6"))
"""Every how many calls that change files the files are looked at; 1: before each of them."""


@pytest.mark.parametrize(
    "kind", ["commit", "active commit", "stream", "stream to base", "rebase", "mirror", "snapshot"]
)
async def test_every_moment_of_a_job_leaves_images_that_read_as_before(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "live"
    folder.mkdir()
    node = await chain(folder, *LAYERS, sizes=(SIZE,) * len(LAYERS))
    target = await open_image(ImageSpec(str(await make(folder / "target.qcow2", size=SIZE)), "qcow2"))
    moments: list[Path] = []
    count = 0

    def keep(name: str, args: tuple[Any, ...]) -> bool:
        nonlocal count
        if name not in READS:
            if count % STEP == 0:
                moments.append(tmp_path / f"{count}-{name}")
                shutil.copytree(folder, moments[-1])
            count += 1
        return False

    with intercepted(keep, keep):
        await OPERATIONS[kind].run(Bench(folder, node, target))
    moments.append(tmp_path / "end")
    shutil.copytree(folder, moments[-1])
    assert await letters(node) == CONTENT
    path = Path(node.path)
    await node.close()
    await target.close()
    assert len(moments) > 1
    for number, moment in enumerate(moments):
        assert await opened(moment / "2.qcow2") == CONTENT, moment.name
        if STEP == 1 or number % 3 == 0:
            for name in ("1.qcow2", "2.qcow2"):
                images.check(moment / name, leaks_allowed=True)
    assert await opened(moments[-1] / path.name) == CONTENT
