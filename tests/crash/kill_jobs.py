"""A real server ends, by SIGKILL or SIGTERM, while a live job works on the disk that clients write to.

The disk is whole through the chain as the headers say it: of the image that was on top, of the one that was to become
it, or, between the command and the answer, of either of the two. And the job can be done again.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.jobs.commit import ActiveCommit, Commit
from nbdserve.jobs.stream import Stream
from nbdserve.units import KIB, MIB
from tests.crash.victim import KillFailure, Result, Victim, load
from tests.support import images
from tests.support.model import ModelDisk, stamps
from tests.support.workload import read_all

KINDS = ("commit", "active commit", "stream", "stream to base", "mirror", "backup", "snapshot", "resize")
SIZE = 8 * MIB
DELAYS = (0.02, 0.1, 0.3)
BASES = ("raw", "qcow2", "vdi")
OPTIONS = ("", "cluster_size=4k", "extended_l2=on,cluster_size=128k", "compat=0.10")


class Admin:
    """An admin client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: list[dict[str, Any]] = []

    @classmethod
    async def connect(cls, path: Path) -> Admin:
        admin = cls(*await asyncio.open_unix_connection(str(path)))
        await admin._receive()
        await admin.execute("qmp_capabilities")
        return admin

    async def _receive(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            raise ConnectionResetError("the server is gone")
        return dict(json.loads(line))

    async def execute(self, name: str, /, **arguments: Any) -> Any:
        """The result of a command; KillFailure when it is refused, ConnectionError when the server ends."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._writer.write(json.dumps({"execute": name, "arguments": given}).encode())
        while "event" in (answer := await self._receive()):
            self._events.append(answer)
        if "error" in answer:
            raise KillFailure(f"{name} {given}: {answer['error']['desc']}")
        return answer["return"]

    async def event(self, name: str) -> dict[str, Any]:
        """The data of the first event of this name."""
        while True:
            for event in self._events:
                if event["event"] == name:
                    return dict(event["data"])
            self._events.append(await self._receive())

    def close(self) -> None:
        self._writer.close()


class Scene:
    """The images of one loop: a base, a layer above it, and the top one, which is served."""

    def __init__(self, kind: str, folder: Path, rng: random.Random) -> None:
        self.kind = kind
        self.folder = folder
        self.rng = rng
        base = rng.choice(BASES)
        self.layers = [
            (folder / f"base.{base}", base),
            (folder / "middle.qcow2", "qcow2"),
            (folder / "top.qcow2", "qcow2"),
        ]
        self.tops = [self.layers[-1]]
        """The images of which one has the disk."""
        self.step = "begin"
        self.begun = asyncio.Event()

    async def make(self) -> bytes:
        """Make the layers, each with some data; what a guest sees."""
        guest = bytearray(SIZE)
        backing: tuple[str, str] | None = None
        for number, (path, fmt) in enumerate(self.layers):
            options = self.rng.choice(OPTIONS) if fmt == "qcow2" else ""
            images.create(path, SIZE, fmt=fmt, options=options, backing=backing)
            node = await open_image(ImageSpec(str(path), fmt))
            for _ in range(24):
                offset = self.rng.randrange(SIZE // (64 * KIB)) * 64 * KIB
                data = stamps(number + 1, offset, self.rng.choice((4, 64, 64)) * KIB)
                await node.write(offset, data)
                guest[offset : offset + len(data)] = data
            await node.close()
            backing = (path.name, fmt)
        return bytes(guest)

    async def run(self, socket: Path, victim: Victim) -> None:
        """Do the job, until it has ended or the server is gone. One that ends has cancelled it, and may say so."""
        try:
            admin = await Admin.connect(socket)
            try:
                await self._run(admin)
            finally:
                admin.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        except KillFailure:
            if not victim.signalled:
                raise
        finally:
            self.begun.set()

    async def _run(self, admin: Admin) -> None:
        device = (await admin.execute("query-block"))[0]["qdev"]
        speed = self.rng.choice((0, 4, 16, 64)) * MIB
        common = {"device": device, "job_id": "job", "speed": speed}
        base, middle = self.layers[0][0], self.layers[1][0]
        self.step = "the job"
        self.begun.set()
        if self.kind == "snapshot":
            for number in range(3):
                await asyncio.sleep(self.rng.random() * 0.1)
                await self._snapshot(admin, device, self.folder / f"overlay{number}.qcow2")
            return
        if self.kind == "resize":
            for factor in (2, 3, 1):
                await asyncio.sleep(self.rng.random() * 0.1)
                await admin.execute("block_resize", device=device, size=factor * SIZE)
            return
        if self.kind == "commit":
            await admin.execute("block-commit", **common, top=str(middle), base=str(base))
        elif self.kind == "active commit":
            below = self.rng.choice(self.layers[:2])
            await admin.execute("block-commit", **common, base=str(below[0]))
            await self._complete(admin, below)
        elif self.kind == "stream":
            await admin.execute("block-stream", **common)
        elif self.kind == "stream to base":
            await admin.execute("block-stream", **common, base=str(base))
        else:
            await self._copy(admin, common)
        await admin.event("BLOCK_JOB_COMPLETED")
        self.step = "after the job"
        await asyncio.sleep(10)  # the kill comes first

    async def _snapshot(self, admin: Admin, device: str, path: Path) -> None:
        self.tops.append((path, "qcow2"))
        await admin.execute("blockdev-snapshot-sync", device=device, snapshot_file=str(path), format="qcow2")
        del self.tops[:-1]

    async def _copy(self, admin: Admin, common: dict[str, Any]) -> None:
        """Mirror or backup."""
        target = (self.folder / "target.qcow2", "qcow2")
        images.create(target[0], SIZE, fmt=target[1], options=self.rng.choice(OPTIONS))
        file = {"driver": "file", "filename": str(target[0])}
        await admin.execute("blockdev-add", driver="qcow2", node_name="target", discard="unmap", file=file)
        await admin.execute(f"blockdev-{self.kind}", **common, target="target", sync="full")
        if self.kind == "mirror":
            await self._complete(admin, target)

    async def _complete(self, admin: Admin, to: tuple[Path, str]) -> None:
        """Complete when ready: ``to`` is the top image then."""
        await admin.event("BLOCK_JOB_READY")
        await asyncio.sleep(self.rng.random() * 0.1)
        self.tops.append(to)
        await admin.execute("block-job-complete", device="job")
        if "error" not in await admin.event("BLOCK_JOB_COMPLETED"):
            del self.tops[:-1]

    async def judge(self, model: ModelDisk, *, leaks_allowed: bool) -> None:
        """The disk is in one of the images that may have it, for stock tools, too, and the job can be done again."""
        problems = []
        for path, fmt in self.tops:
            try:
                content = await self._content(path, fmt)
                model.check_crash(content[:SIZE])
                assert not any(content[SIZE:]), "what is new is not zeroes"
            except Exception as error:
                problems.append(f"{path.name}: {type(error).__name__}: {error}")
            else:
                break
        else:
            raise KillFailure("; ".join(problems))
        unfinished = {other for other, _ in self.tops} - {path}
        for image in set(self.folder.glob("*.qcow2")) - unfinished:
            images.check(image, leaks_allowed=leaks_allowed)
        if images.raw_content(path, fmt, self.folder) != content:
            raise KillFailure(f"qemu-img reads {path.name} as something else")
        if (path, fmt) == self.layers[-1]:
            await self._again(path, content)

    async def _content(self, path: Path, fmt: str) -> bytes:
        node = await open_image(ImageSpec(str(path), fmt, read_only=True))
        try:
            return await read_all(node, node.size)
        finally:
            await node.close()

    async def _again(self, path: Path, content: bytes) -> None:
        """What was interrupted is done to its end."""
        node = await open_image(ImageSpec(str(path), "qcow2"))
        job = self._job(node)
        if job is not None:
            await job.result()
        if await read_all(node, node.size) != content:
            raise KillFailure("done again, it has another result")
        now = (Path(node.path), node.format)
        await node.close()
        if images.raw_content(*now, self.folder) != content:
            raise KillFailure("done again, qemu-img reads another result")

    def _job(self, node: Node) -> Commit | ActiveCommit | Stream | None:
        last = len(node.layers) - 1
        if self.kind == "commit" and last == 2:
            return Commit("job", node, 1, 2)
        if self.kind == "active commit":
            return ActiveCommit("job", node, last, auto_complete=True)
        if self.kind.startswith("stream") and last:
            return Stream("job", node, None if self.kind == "stream" else last)
        return None


async def kill_once(kind: str, seed: int, folder: Path, result: Result, number: int = signal.SIGKILL) -> str:
    """One disk, one job, one signal; how far the job had come. KillFailure when something is lost.

    After SIGTERM that is every acknowledged write, and any leaked cluster.
    """
    rng = random.Random(f"{kind}/{seed}")
    scene = Scene(kind, folder, rng)
    model = ModelDisk(SIZE, await scene.make())
    socket = folder / "admin.sock"
    victim = Victim(scene.tops[0][0], "qcow2", folder / "nbd.sock", "--admin", socket)
    try:
        try:
            await load(
                victim,
                model,
                rng,
                result,
                delays=DELAYS,
                meanwhile=partial(scene.run, socket, victim),
                after=scene.begun,
                number=number,
            )
            if number == signal.SIGTERM:
                victim.end()
                model.flushed(model.begin_flush())
        finally:
            victim.kill()
        await scene.judge(model, leaks_allowed=number == signal.SIGKILL)
        if victim.complains:
            raise KillFailure("the server has met an error")
    except Exception as error:
        where = f"{kind}, seed {seed}, {scene.step}: {error or type(error).__name__}"
        raise KillFailure(f"{where}\n{victim.said()}") from error
    result.loops += 1
    return scene.step


def run(
    loops: int,
    seed: int,
    kinds: tuple[str, ...] = KINDS,
    folder: Path | None = None,
    *,
    number: int = signal.SIGKILL,
) -> Result:
    """``loops`` kills by signal ``number``, shared out among the kinds."""
    total, started = Result(), time.monotonic()
    for index, kind in enumerate(kinds):
        steps: dict[str, int] = {}
        for loop in range(loops // len(kinds) + (index < loops % len(kinds))):
            with tempfile.TemporaryDirectory(dir=folder) as directory:
                step = asyncio.run(kill_once(kind, seed + loop, Path(directory), total, number))
            steps[step] = steps.get(step, 0) + 1
        total.geometries.add(kind)
        print(f"{kind}: " + ", ".join(f"{count} in {step}" for step, count in sorted(steps.items())), flush=True)
    total.seconds = time.monotonic() - started
    return total
