"""One round: a live job under clients that write at random, ended in some way; every byte is known all the time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nbdserve.block.forms import READ_DATA, READ_ZERO
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.block.writer import WRITE_DONE, WRITE_WAIT
from nbdserve.errors import ConfigError, JobError, RequestError
from nbdserve.jobs.backup import Backup
from nbdserve.jobs.commit import ActiveCommit, Commit
from nbdserve.jobs.job import Job
from nbdserve.jobs.live_copy import GRANULARITY
from nbdserve.jobs.mirror import Mirror
from nbdserve.jobs.snapshot import create_overlay, snapshot
from nbdserve.jobs.status import JobStatus
from nbdserve.jobs.stream import Stream
from nbdserve.units import KIB, MIB
from tests.support import images

SIZE = 4 * MIB
STRIPE = 16 * KIB
"""Clients write where no other does, but in clusters that others write to."""
CLIENTS = 3
KINDS = (
    "active commit",
    "commit",
    "stream",
    "stream to base",
    "mirror",
    "mirror top",
    "mirror none",
    "backup",
    "snapshot",
    "resize",
)
TOPS = (("qcow2", ""), ("qcow2", "cluster_size=4096"), ("qed", ""), ("qcow2", "extended_l2=on,cluster_size=128k"))
BASES = (*TOPS, ("raw", ""), ("qcow2", "compat=0.10"), ("vdi", ""), ("parallels", ""))
UNCHECKED = ("raw", "qcow")
"""``qemu-img check`` does not know how."""
RESIZED = (*BASES, ("vhdx", ""), ("qcow", ""))


class LiveFailure(AssertionError):
    """Somebody is wrong; the message says in which round, so that it can be made again."""


class Disk:
    """A node, and what every byte of it should be."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.content = bytearray(node.size)

    async def read(self, offset: int, length: int) -> None:
        """Read in one of the ways of a session, and compare."""
        buffer = memoryview(bytearray(length))
        outcome = self.node.try_read_into(offset, buffer)
        if outcome == READ_ZERO:
            buffer = memoryview(bytes(length))
        elif outcome != READ_DATA:
            await self.node.read_into(offset, buffer)
        assert buffer == self.content[offset : offset + length], f"read of {length} bytes at {offset}"

    async def write(self, offset: int, data: bytes) -> None:
        """Write in one of the ways of a session."""
        taken = asyncio.get_running_loop().create_future()
        outcome = self.node.submit_write(offset, memoryview(data), taken.set_result)
        if outcome == WRITE_WAIT:
            await self.node.write(offset, data)
        elif outcome != WRITE_DONE and (error := await taken) is not None:
            raise error
        self._changed(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        await self.node.zero(offset, length, unmap=unmap)
        self._changed(offset, bytes(length))

    def _changed(self, offset: int, data: bytes) -> None:
        inside = data[: max(0, len(self.content) - offset)]  # the disk may have become smaller since
        self.content[offset : offset + len(inside)] = inside

    async def resize(self, size: int) -> None:
        await self.node.resize(size)
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))

    async def verify(self) -> None:
        for offset in range(0, self.node.size, MIB):
            length = min(MIB, self.node.size - offset)
            assert await self.node.read(offset, length) == self.content[offset : offset + length], f"at {offset}"


async def client(disk: Disk, number: int, rng: random.Random, stop: asyncio.Event) -> int:
    """Reads and writes in every third stripe until told to stop; the requests made."""
    stripes = range(number * STRIPE, disk.node.size, CLIENTS * STRIPE)
    done = 0
    while not stop.is_set():
        start = rng.choice(stripes)
        offset = start + rng.randrange(STRIPE // 512) * 512
        length = rng.randrange(512, start + STRIPE - offset + 1, 512) if start + STRIPE - offset > 512 else 512
        try:
            await _request(disk, rng, offset, length)
        except RequestError:
            if offset + length <= len(disk.content):
                raise
        done += 1
        await asyncio.sleep(rng.choice((0, 0, 0.001)))
    return done


async def _request(disk: Disk, rng: random.Random, offset: int, length: int) -> None:
    what = rng.random()
    if what < 0.5:
        await disk.write(offset, rng.randbytes(4) * (length // 4))
    elif what < 0.6:
        await disk.zero(offset, length, unmap=rng.random() < 0.5)
    elif what < 0.65:
        await disk.node.flush()
    else:
        await disk.read(offset, length)


async def _fill(node: Node, rng: random.Random, content: bytearray) -> None:
    disk = Disk(node)
    disk.content = content
    for _ in range(rng.randrange(1, 12)):
        offset, length = images.random_range(rng, node.size, largest=MIB)
        if rng.random() < 0.2:
            await disk.zero(offset, length, unmap=True)
        else:
            await disk.write(offset, rng.randbytes(512) * (length // 512))
    await disk.verify()
    await node.close()


class Round:
    """The images of one round, and what is done to them."""

    def __init__(self, kind: str, seed: int, folder: Path) -> None:
        self.kind = kind
        self.rng = random.Random(f"{kind} {seed}")
        self.folder = folder
        self.step = "make"
        self.files: list[tuple[Path, str]] = []
        self.content = bytearray()
        self.moment = b""
        """The disk at the begin of a backup, or when a mirror was ready."""
        self.final = b""
        """The disk when the last of a mirror was copied."""
        self.requests = 0

    async def run(self) -> str:
        content = bytearray(SIZE)
        shapes = [self.rng.choice(BASES), *(self.rng.choice(TOPS) for _ in range(self.rng.randrange(2, 4)))]
        if self.kind == "resize" and self.rng.random() < 0.5:
            shapes = [self.rng.choice(RESIZED)]
        backing = None
        for number, (fmt, options) in enumerate(shapes):
            path = self.folder / f"layer{number}.{fmt}"
            images.create(path, SIZE, fmt=fmt, options=options, backing=backing)
            backing = (path.name, fmt)
            self.files.append((path, fmt))
            await _fill(await self._open(path, fmt), self.rng, content)
        node = await self._open(*self.files[-1])
        disk = Disk(node)
        disk.content = self.content = content
        self.step = "job"
        if self.kind in ("snapshot", "resize"):
            return await self._without_job(disk)
        job, target = await self._job(node)
        async with self._clients(disk):
            end = await self._end(job)
        self.step = f"after {end}"
        if end not in ("cancelled", "soft") and job.error is not None:
            raise job.error
        await disk.verify()
        await node.flush()
        result_path, result_format = Path(node.path), node.format
        await node.close()
        self.step = f"stock after {end}"
        if isinstance(job, Backup) and target and end == "complete":
            assert images.raw_content(*target, self.folder) == self.moment, "the backup is not of the moment"
        if target and end == "soft":
            self._judge_mirror(images.raw_content(*target, self.folder))
        for path, fmt in [*self.files, *([target] if target and end in ("complete", "soft") else [])]:
            if fmt not in UNCHECKED:
                images.check(path, fmt)
        assert images.raw_content(result_path, result_format, self.folder) == disk.content
        return f"{self.kind}: {end}, {self.requests} requests"

    @asynccontextmanager
    async def _clients(self, disk: Disk) -> AsyncIterator[None]:
        """Clients are at work inside; an error of theirs is raised at the end."""
        stop = asyncio.Event()
        clients = [
            asyncio.create_task(client(disk, number, random.Random(self.rng.random()), stop))
            for number in range(CLIENTS)
        ]
        try:
            yield
            assert stop.is_set() or not any(task.done() for task in clients), [task for task in clients if task.done()]
        finally:
            stop.set()
            results = await asyncio.gather(*clients, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
                self.requests += result

    def _judge_mirror(self, found: bytes) -> None:
        """Ended softly, the target is the disk of that moment; with sync=none what has changed before it was ready is
        in it or not, by granules."""
        for at in range(0, len(found), GRANULARITY):
            ready, end = (disk[at : at + GRANULARITY] for disk in (self.moment, self.final))
            granule = found[at : at + GRANULARITY]
            untouched = self.kind == "mirror none" and ready == end and not any(granule)
            assert granule == end or untouched, f"the mirror at {at}"

    async def _settled_content(self) -> bytes:
        """Of a drained disk, when clients whose request was the last one have noted what it was."""
        for _ in range(5):
            await asyncio.sleep(0)
        return bytes(self.content)

    async def _open(self, path: Path, fmt: str) -> Node:
        """``path``, on the layers made so far without the last one."""
        below = self._formats(len(self.files) - 2)
        return await open_image(ImageSpec(str(path), fmt, discard="unmap", backing=below or "header"))

    async def _without_job(self, disk: Disk) -> str:
        """What takes but a moment, several times under clients."""
        node = disk.node
        async with self._clients(disk):
            for number in range(self.rng.randrange(1, 4)):
                await asyncio.sleep(self.rng.random() * 0.05)
                if self.kind == "snapshot":
                    await self._snapshot(node, number)
                else:
                    with contextlib.suppress(ConfigError):  # a format that does not shrink
                        await disk.resize(self.rng.randrange(SIZE // 2, 2 * SIZE, 512))
            await asyncio.sleep(self.rng.random() * 0.05)
        await disk.verify()
        assert all(layer.read_only for layer in node.layers[1:])
        await node.close()
        self.step = "stock"
        for path, fmt in self.files:
            if fmt not in UNCHECKED:
                images.check(path, fmt)
        assert images.raw_content(*self.files[-1], self.folder) == disk.content
        return f"{self.kind}: complete, {self.requests} requests"

    async def _snapshot(self, node: Node, number: int) -> None:
        """Put a layer on top, which then holds its own moment."""
        fmt = self.rng.choice(("qcow2", "qed"))
        path = self.folder / f"snapshot{number}.{fmt}"
        overlay = await create_overlay(str(path), fmt, node)
        await snapshot([(node, overlay)])
        self.files.append((path, fmt))

    def _formats(self, index: int) -> ImageSpec | None:
        """The formats of the layers below, which QED does not say."""
        if index < 0:
            return None
        return ImageSpec("", self.files[index][1], discard="unmap", backing=self._formats(index - 1))

    async def _job(self, node: Node) -> tuple[Job, tuple[Path, str] | None]:
        last = len(node.layers) - 1
        speed = self.rng.choice((0, 0, 8 * MIB, 32 * MIB))
        if self.kind == "active commit":
            return ActiveCommit("job", node, self.rng.randrange(1, last + 1), speed=speed), None
        if self.kind == "commit":
            top = self.rng.randrange(1, last)
            return Commit("job", node, top, self.rng.randrange(top + 1, last + 1), speed=speed), None
        if self.kind == "stream":
            return Stream("job", node, speed=speed), None
        if self.kind == "stream to base":
            return Stream("job", node, self.rng.randrange(1, last + 1), speed=speed), None
        fmt, options = self.rng.choice((("qcow2", ""), ("raw", ""), ("qed", "")))
        path = self.folder / f"target.{fmt}"
        backing = (self.files[-2][0].name, self.files[-2][1]) if self.kind == "mirror top" and fmt != "raw" else None
        images.create(path, SIZE, fmt=fmt, options=options, backing=backing)
        target = await (self._open(path, fmt) if backing else open_image(ImageSpec(str(path), fmt, discard="unmap")))
        if self.kind == "backup":
            return Backup("job", node, target, target_is_zero=True, speed=speed), (path, fmt)
        flush = target.flush

        async def flush_at_the_end() -> None:
            self.final = await self._settled_content()
            await flush()

        target.flush = flush_at_the_end  # type: ignore[method-assign]
        sync = "none" if self.kind == "mirror none" else "top" if backing else "full"
        return Mirror("job", node, target, sync=sync, target_is_zero=not backing, speed=speed), (path, fmt)

    async def _end(self, job: Job) -> str:
        """Start the job and bring it to one of its ends."""
        rng = self.rng
        job.announce(lambda event: None)
        await asyncio.sleep(rng.random() * 0.02)
        if isinstance(job, Backup):
            async with job.node.drained():
                self.moment = await self._settled_content()
                job.start()
        else:
            job.start()
        way = rng.choice(("complete", "complete", "complete", "cancelled", "soft", "pause"))
        if self.kind == "mirror none" and way != "cancelled":
            way = "soft"  # its target is no disk to go on with
        delay = rng.random() * rng.choice((0.02, 0.3))
        if way == "pause":
            await asyncio.sleep(delay)
            with contextlib.suppress(JobError):
                job.pause()
                await asyncio.sleep(0.02)
                job.resume()
            way = "complete"
        if way == "cancelled":
            await asyncio.sleep(delay)
            with contextlib.suppress(JobError):
                job.cancel(force=True)
            async with asyncio.timeout(60):
                await job.wait()
            return "cancelled" if job.cancelled else "complete"
        async with asyncio.timeout(60):
            if job.completes:
                while job.status is not JobStatus.READY and not job.ended:
                    await asyncio.sleep(0.005)
                self.moment = bytes(self.content)
                await asyncio.sleep(rng.random() * 0.05)
                if not job.ended:
                    (job.complete if way == "complete" else job.cancel)()
            await job.wait()
        if way == "soft" and not job.completes:
            way = "complete"
        return way


def run_round(kind: str, seed: int, keep: Path | None = None) -> str:
    """One round; a line that says what was done. ``keep``: where the images of a failing one are left."""
    folder = Path(tempfile.mkdtemp(dir=keep or images.SCRATCH))
    round_ = Round(kind, seed, folder)
    try:
        done = asyncio.run(round_.run())
    except Exception as error:
        where = f"\nkept: {folder}" if keep else ""
        text = str(error) or type(error).__name__
        raise LiveFailure(f"{kind}, seed {seed}, step: {round_.step}\n{text}{where}") from error
    else:
        keep = None
        return done
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
