"""One operation of a job's files fails: the job says so or copes, and no image reads wrongly, then or later."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import NbdserveError
from nbdserve.jobs.backup import Backup
from nbdserve.jobs.commit import ActiveCommit, Commit
from nbdserve.jobs.job import Job
from nbdserve.jobs.mirror import Mirror
from nbdserve.jobs.rebase import Rebase
from nbdserve.jobs.stream import Stream
from nbdserve.storage.file import FileStorage
from tests.jobs.chains import chain, letters, make, opened
from tests.support import images

LAYERS = ("raw 0a 1a 2a", "qcow2 1b 4b 5z", "qcow2 2c")
CONTENT = "abc.b"
STEP = int(os.environ.get("NBDSERVE_FAULT_STEP", "7"))
"""Every how many operations one is made to fail; 1: each of them."""
METHODS = ("write", "write_all", "write_stable", "zero", "truncate", "flush", "read_into")

JOBS: dict[str, Callable[[Node, Node], Job]] = {
    "commit": lambda node, target: Commit("job", node, 1, 2),
    "active commit": lambda node, target: ActiveCommit("job", node, 2, auto_complete=True),
    "stream": lambda node, target: Stream("job", node),
    "mirror": lambda node, target: Mirror("job", node, target, auto_complete=True, owns_target=False),
    "backup": lambda node, target: Backup("job", node, target, owns_target=False),
    "rebase": lambda node, target: Rebase("job", node, None, None),
}


class Faulty:
    """The ``at``-th operation on files fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> None:
        self.left = at
        self.fired = False
        for name in METHODS:
            self._wrap(monkeypatch, name, number)
        for name in ("_try_write_memory", "_try_write_nowait", "_try_read_memory"):
            monkeypatch.setattr(FileStorage, name, lambda *arguments: False)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
        real = getattr(FileStorage, name)

        async def method(storage: FileStorage, *arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                self.fired = True
                raise OSError(number, f"injected into {name}")
            return await real(storage, *arguments, **options)

        monkeypatch.setattr(FileStorage, name, method)


@pytest.mark.parametrize("kind", JOBS)
async def test_no_fault_makes_an_image_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    fired, at, failures = True, 0, 0
    while fired:
        folder = tmp_path / str(at)
        folder.mkdir()
        node = await chain(folder, *LAYERS)
        target = await open_image(ImageSpec(str(await make(folder / "target.qcow2")), "qcow2"))
        job = JOBS[kind](node, target)
        with monkeypatch.context() as patched:
            faulty = Faulty(patched, at, errno.ENOSPC if at % 2 else errno.EIO)
            try:
                await job.result()
            except (OSError, NbdserveError) as error:
                failures += 1
                assert faulty.fired, error
                assert "injected" in str(error) or str(folder) in str(error), error
        fired = faulty.fired
        assert not node.busy_with
        assert await letters(node) == CONTENT, f"operation {at}"
        for disk in (node, target):
            try:
                await disk.close()
            except OSError as error:
                assert fired, error
        top = Path(node.path)
        assert await opened(top) == CONTENT, f"operation {at}"
        if top != folder / "2.qcow2":  # what it was is still there, and reads as before
            assert await opened(folder / "2.qcow2") == CONTENT
        if at % 14 == 0 and top.suffix == ".qcow2":
            images.check(top, leaks_allowed=True)
        at += STEP
    assert failures > 0
    assert job.error is None
