"""One operation on the files of a job fails: its caller is told, and whoever uses the disk notices nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import NbdserveError
from nbdserve.formats.registry import driver_for
from nbdserve.jobs import copy as copying
from nbdserve.jobs.backup import Backup
from nbdserve.jobs.commit import ActiveCommit, Commit
from nbdserve.jobs.convert import ConvertJob
from nbdserve.jobs.copy import CopyOptions
from nbdserve.jobs.job import Job
from nbdserve.jobs.mirror import Mirror
from nbdserve.jobs.rebase import Rebase
from nbdserve.jobs.snapshot import create_overlay, snapshot
from nbdserve.jobs.stream import Stream
from nbdserve.jobs.target import NewImage, TargetImage
from nbdserve.storage.file import FileStorage
from nbdserve.storage.pool import Completion, WorkerPool
from nbdserve.units import MIB, SECTOR_SIZE
from tests.jobs.chains import UNIT, chain, letters, make, opened
from tests.support import images

SIZE: Final = 3 * MIB
LAYERS: Final = ("raw 0a 1a 2a 20a 36a 44a", "qcow2 1b 4b 5z 21b 44z", "qcow2 2c 9d 40c")
"""Data in each of the pieces that jobs copy at a time."""


def content_of(*layers: str) -> str:
    """What ``letters`` shows of a chain."""
    units = {}
    for layer in layers:
        for write in layer.split()[1:]:
            units[int(write[:-1])] = write[-1].replace("z", ".")
    return "".join(units.get(unit, ".") for unit in range(max(units) + 1)).rstrip(".")


CONTENT: Final = content_of(*LAYERS)
READS: Final = ("read_fully", "read_all", "seek_map", "open_image_file")
WRITES: Final = ("write_fully", "write_all", "write_and_sync", "_zero", "_discard", "_truncate", "extend_file", "move")
SYNCS: Final = ("fdatasync", "sync_directory_of")


@contextmanager
def intercepted(instead: Callable[[str, tuple[Any, ...]], bool], otherwise: Callable[..., Any]) -> Iterator[None]:
    """Ask ``instead``, with name and arguments, before each system call on files; True: call ``otherwise``."""
    submit = WorkerPool.submit

    def asking(pool: WorkerPool, fn: Callable[..., Any], args: tuple[Any, ...], completion: Completion) -> None:
        if fn.__name__ in (*READS, *WRITES, *SYNCS) and instead(fn.__name__, args):
            submit(pool, otherwise, (fn, args), completion)
        else:
            submit(pool, fn, args, completion)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WorkerPool, "submit", asking)
        for name in ("_try_write_memory", "_try_write_nowait", "_try_read_memory", "_try_write_inline"):
            patched.setattr(FileStorage, name, lambda *arguments: False)
        yield


@dataclass
class Faulty:
    """The system call number ``at`` on files fails, counted over all of them.

    With EIO it is one of any kind; with ENOSPC one that writes, half of which may be done, and so does every later
    write to the same file: the disk it is on is full.
    """

    at: int
    number: int
    count: int = 0
    fired: str = ""
    """What failed."""
    _full: set[str] = field(default_factory=set)

    def armed(self) -> AbstractContextManager[None]:
        """Fail inside."""
        return intercepted(self._strikes, self._fail)

    def _strikes(self, name: str, args: tuple[Any, ...]) -> bool:
        if self.number == errno.ENOSPC and name not in WRITES:
            return False
        file = _file(name, args)
        self.count += 1
        if self.count - 1 == self.at:
            self.fired = f"{name} of {Path(file).name}"
            if self.number == errno.ENOSPC:
                self._full.add(file)
            return True
        return file in self._full

    def _fail(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if fn.__name__ == "write_fully" and self.number == errno.ENOSPC:
            fd, offset, data = args
            fn(fd, offset, memoryview(data)[: len(data) // 2 // SECTOR_SIZE * SECTOR_SIZE])
        raise OSError(self.number, os.strerror(self.number))


def _file(name: str, args: tuple[Any, ...]) -> str:
    """The path of the file that a call is for."""
    if name in ("open_image_file", "sync_directory_of"):
        return str(args[0])
    if name == "move":  # what it writes with knows the file
        args = args[0].args
    fd = next(argument for argument in args if isinstance(argument, int))
    return os.readlink(f"/proc/self/fd/{fd}")


@dataclass
class Bench:
    """A disk that is in use, and what an operation needs besides."""

    folder: Path
    node: Node
    target: Node
    runs: int = 0
    """How often the operation was begun."""
    kept: list[Path] = field(default_factory=list)
    """Images that have the whole content when the operation has ended well."""

    @property
    def target_path(self) -> Path:
        return Path(self.target.path)


def _job(make_job: Callable[[Bench], Job], *, keeps_target: bool = False) -> Callable[[Bench], Awaitable[None]]:
    async def run(bench: Bench) -> None:
        job = make_job(bench)
        await job.result()
        if keeps_target:
            bench.kept.append(bench.target_path)

    return run


async def _convert(bench: Bench) -> None:
    path = bench.folder / f"new{bench.runs}.qcow2"
    image = NewImage(str(path), driver_for("qcow2"), bench.node.size, {}, cache="writeback")
    try:
        async with TargetImage(image) as target:
            await ConvertJob("job", [bench.node], target.node, CopyOptions(zeroed=True)).result()
            await target.publish()
    finally:
        assert not list(bench.folder.glob(".*")), "what is not complete is removed"
        if path.exists():
            bench.kept.append(path)


async def _convert_in_one_trip(bench: Bench) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(copying, "_TRUSTED", 0)
        await _convert(bench)


async def _snapshot(bench: Bench) -> None:
    overlay = await create_overlay(str(bench.folder / f"over{bench.runs}.qcow2"), "qcow2", bench.node)
    try:
        await snapshot([(bench.node, overlay)])
    except BaseException:
        await overlay.close()
        raise


async def _internal(bench: Bench) -> None:
    """Make a snapshot, change something, go back to the snapshot, and delete it."""
    node = bench.node
    await _change(node, "create_snapshot", f"s{bench.runs}")
    name = node.top.info().snapshots[-1].id
    await node.write(UNIT * 7, b"x" * UNIT)
    await _change(node, "apply_snapshot", name)
    await _change(node, "delete_snapshot", name)


async def _amend(bench: Bench) -> None:
    for width in ("64", "16"):
        await _change(bench.node, "amend", {"refcount_bits": width})


async def _change(node: Node, method: str, argument: object) -> None:
    """Change the top layer as a whole."""
    async with node.drained():
        await node.flush()
        try:
            await getattr(node.top, method)(argument)
        finally:
            node.replace_layers(node.layers)


def _resize(size: int) -> Callable[[Bench], Awaitable[None]]:
    async def run(bench: Bench) -> None:
        await bench.node.resize(size)

    return run


@dataclass(frozen=True)
class Operation:
    """One that is made to fail at every step."""

    run: Callable[[Bench], Awaitable[None]]
    contents: tuple[str, ...] = (CONTENT,)
    """What the disk may hold afterwards."""
    layers: tuple[str, ...] = LAYERS
    gives_up: bool = False
    """Where nobody knows what is on the disk now, the image says so from then on, and is to be opened anew."""


_GIVEN_UP = re.compile("could not be (written|resized)|tables were replaced")

OPERATIONS: Final[dict[str, Operation]] = {
    "commit": Operation(_job(lambda bench: Commit("job", bench.node, 1, 2))),
    "active commit": Operation(_job(lambda bench: ActiveCommit("job", bench.node, 2, auto_complete=True))),
    "stream": Operation(_job(lambda bench: Stream("job", bench.node))),
    "stream to base": Operation(_job(lambda bench: Stream("job", bench.node, 2))),
    "mirror": Operation(
        _job(lambda bench: Mirror("job", bench.node, bench.target, auto_complete=True, owns_target=False))
    ),
    "mirror copy": Operation(
        _job(
            lambda bench: Mirror("job", bench.node, bench.target, auto_complete=True, pivot=False, owns_target=False),
            keeps_target=True,
        )
    ),
    "backup": Operation(
        _job(lambda bench: Backup("job", bench.node, bench.target, owns_target=False), keeps_target=True)
    ),
    "rebase": Operation(_job(lambda bench: Rebase("job", bench.node, None, None))),
    "convert": Operation(_convert),
    "convert in one trip": Operation(_convert_in_one_trip),
    "snapshot": Operation(_snapshot),
    "internal snapshot": Operation(_internal, (CONTENT, f"{CONTENT[:7]}x{CONTENT[8:]}"), gives_up=True),
    "amend": Operation(_amend, gives_up=True),
    "grow": Operation(_resize(SIZE + 4 * UNIT), gives_up=True),
    "shrink": Operation(_resize(8 * UNIT), (CONTENT, CONTENT[:8].rstrip(".")), gives_up=True),
    "grow raw": Operation(_resize(SIZE + 4 * UNIT), ("aaa",), ("raw 0a 1a 2a",)),
    "grow qed": Operation(_resize(SIZE + 4 * UNIT), ("ab",), ("raw 0a 1a", "qed 1b")),
    "grow vdi": Operation(_resize(SIZE + 4 * UNIT), ("abb",), ("vdi 0a 1b 2b",)),
    "grow vhdx": Operation(_resize(SIZE + 4 * UNIT), ("abb",), ("vhdx 0a 1b 2b",)),
    "grow vpc": Operation(_resize(SIZE + 4 * UNIT), ("abb",), ("vpc 0a 1b 2b",)),
    "grow qcow": Operation(_resize(SIZE + 4 * UNIT), ("abb",), ("qcow 0a 1b 2b",), gives_up=True),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run with one fault."""

    fired: str
    failed: bool


async def run_with_fault(folder: Path, name: str, at: int, number: int, *, qemu: bool = False) -> Outcome:
    """Make operation ``name`` with its system call ``at`` failing; AssertionError when anybody is worse off for it."""
    operation = OPERATIONS[name]
    node = await chain(folder, *operation.layers, sizes=(SIZE,) * len(operation.layers))
    files = sorted(path for path in folder.iterdir())
    was = Path(node.path)
    target = await open_image(ImageSpec(str(await make(folder / "target.qcow2", size=SIZE)), "qcow2"))
    bench = Bench(folder, node, target)
    tasks = asyncio.all_tasks()
    faulty = Faulty(at, number)
    failure: Exception | None = None
    with faulty.armed():
        try:
            await operation.run(bench)
        except (OSError, NbdserveError) as error:
            failure = error
    if failure is not None:
        assert faulty.fired, failure
        text = str(failure)
        assert os.strerror(number) in text or str(folder) in text, failure
    assert not node.busy_with
    assert not node.gate.closed
    assert not node.gate.inside
    left = asyncio.all_tasks() - tasks
    if left:  # a table that others may want, too, is loaded to the end
        _, left = await asyncio.wait(left, timeout=60)
    assert not left, f"tasks left: {[task.get_coro() for task in left]}"
    dead = {layer.path for disk in (node, target) for layer in disk.layers if _is_dead(layer.storage)}

    async def attempt(what: str, work: Awaitable[None]) -> None:
        """What goes on as if nothing had been, unless it is refused for a reason."""
        try:
            await work
        except (OSError, NbdserveError) as error:
            given_up = operation.gives_up and _GIVEN_UP.search(str(error))
            assert given_up or any(path in str(error) for path in dead), f"{what}: {error!r}"

    async def read() -> None:
        assert await letters(node) in operation.contents, "the disk"

    await attempt("reading", read())
    await attempt("writing", _write(node))
    bench.runs += 1
    if failure is not None and [layer.path for layer in node.layers] == [str(path) for path in reversed(files)]:
        await attempt("the same again", operation.run(bench))
    await attempt("reading in the end", read())
    for disk in (node, target):
        try:
            await disk.close()
        except (OSError, NbdserveError) as error:
            assert dead or operation.gives_up, error
    assert not (left_open := _open_below(folder)), f"files left open: {left_open}"
    for path in {Path(node.path), was, *bench.kept}:  # and what it was is still there, and reads as before
        assert await opened(path) in operation.contents, path.name
    if qemu:
        for path in folder.glob("*.qcow2"):
            if path != bench.target_path or path in bench.kept:
                images.check(path, leaks_allowed=True)
    return Outcome(faulty.fired, failure is not None)


def _open_below(folder: Path) -> list[str]:
    """The files in ``folder`` that this process has open; others may be those of a test before, which end meanwhile."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if path.startswith(f"{folder}/"):
            found.append(path)
    return sorted(found)


def _is_dead(storage: Any) -> bool:
    return isinstance(storage, FileStorage) and storage._failure is not None


async def _write(node: Node) -> None:
    """Write what is there, and flush."""
    for unit in (0, 9):
        offset = min(unit, node.size // UNIT - 1) * UNIT
        await node.write(offset, await node.read(offset, UNIT))
    await node.flush()
