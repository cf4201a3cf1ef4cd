"""A random guest on a recorded image, and the judgement of every state a power failure could have left."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.block.node import Node
from tests.support import images
from tests.support.geometries import KITS, Geometry, Image, build, judge
from tests.support.model import ModelDisk
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import CrashState, Replay
from tests.support.unlocking import remembered_keys
from tests.support.workload import Mix, Workload, read_all


class CrashFailure(AssertionError):
    """A promise was broken; the message says by which state of which run, so that it can be made again."""


class _Broken(AssertionError):
    """What is wrong with a state."""


@dataclass
class Plan:
    """How a scenario is run. ``qemu_every``: one state in so many is also judged by qemu-img (0: none)."""

    operations: int = 60
    states: int = 300
    qemu_every: int = 20
    continue_every: int = 25
    """One state in so many is opened for writing and used on, and crashed once more."""
    mix: Mix = field(default_factory=lambda: Mix(largest=256 << 10))
    ignored_site: str | None = None
    keep: Path | None = None
    """Where the files of a failing state are left."""


@dataclass
class Tally:
    """What was done."""

    states: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    leaky: int = 0
    judged_by_qemu: int = 0
    continued: int = 0
    sites: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[int] = field(default_factory=Counter)
    """What ``submit_write`` answered the guest."""

    def add(self, other: Tally) -> None:
        """Sum up."""
        self.states += other.states
        self.by_kind += other.by_kind
        self.leaky += other.leaky
        self.judged_by_qemu += other.judged_by_qemu
        self.continued += other.continued
        self.sites += other.sites
        self.outcomes += other.outcomes


def run_scenario(geometry: Geometry, seed: int, plan: Plan) -> Tally:
    """One image, one run of a guest, its crash states. CrashFailure at the first broken promise."""
    image = build(geometry, seed % 4)
    with tempfile.TemporaryDirectory(dir=images.SCRATCH) as name, remembered_keys():
        scenario = _Scenario(image, seed, plan, Path(name))
        return asyncio.run(scenario.run())


class _Scenario:
    def __init__(self, image: Image, seed: int, plan: Plan, scratch: Path) -> None:
        self.image = image
        self.seed = seed
        self.plan = plan
        self.scratch = scratch
        self.rng = random.Random(f"{image.geometry.name}/{seed}")
        self.tally = Tally()

    async def run(self) -> Tally:
        before = ModelDisk(self.image.size, self.image.guest)
        await self._guest_and_crashes(self.image.contents, before, self.plan.operations, self.plan.states, again=True)
        return self.tally

    async def _guest_and_crashes(
        self, contents: Sequence[bytes | bytearray], before: ModelDisk, operations: int, budget: int, *, again: bool
    ) -> None:
        recorder = Recorder(self.rng.getrandbits(32), ignored_site=self.plan.ignored_site)
        stores = [recorder.storage(content) for content in contents]
        leader, follower = before.copy(), before.copy()
        await self._guest(stores, recorder, leader, operations)
        self.tally.sites.update(recorder.sites)
        replay = Replay(recorder, follower, self.rng.getrandbits(32))
        for state in replay.states(budget):
            self.tally.states += 1
            self.tally.by_kind[state.kind] += 1
            try:
                found = await self._judge(state, follower)
                if again and self.plan.continue_every and self.tally.states % self.plan.continue_every == 0:
                    self.tally.continued += 1
                    after = before.copy()
                    after.adopt(found)
                    await self._guest_and_crashes(state.contents, after, 12, 8, again=False)
            except CrashFailure:
                raise
            except Exception as error:
                raise self._failure(state, error) from error

    async def _guest(
        self, stores: Sequence[ByteStorage], recorder: Recorder, model: ModelDisk, operations: int
    ) -> None:
        """Some of the work in each of one or two sessions, the last one sometimes closed."""
        node = await self.image.open(stores)
        workload = Workload(node, model, random.Random(self.rng.random()), mix=self.plan.mix, note=recorder.note)
        await workload.run(operations)
        self.tally.outcomes.update(workload.outcomes)
        model.check_read(await read_all(node, model.size))
        if self.rng.random() < 0.3:
            begun = model.begin_flush()
            await node.close()
            recorder.note(lambda follower: follower.flushed(begun), acknowledges=True)

    async def _judge(self, state: CrashState, model: ModelDisk) -> bytes:
        """Read the state with our driver, check it with ours, and now and then with qemu-img; the guest's content."""
        stores = [ByteStorage(bytearray(content), f"crash {state.position}") for content in state.contents]
        node = await self.image.open(stores, read_only=True)
        content = await read_all(node, model.size)
        model.check_crash(content)
        await self._check_metadata(node)
        await node.close()
        for store, was in zip(stores, state.contents, strict=True):
            if store.content != was:
                raise _Broken(f"reading {store.path} changed it")
        if self.plan.qemu_every and self.tally.states % self.plan.qemu_every == 0:
            self.tally.judged_by_qemu += 1
            self._judge_by_qemu(state, content)
        return content

    async def _check_metadata(self, node: Node) -> None:
        if not node.top.can("check"):
            return
        result = await node.top.check()
        self.tally.leaky += bool(result.leaks)
        if result.corruptions > KITS[self.image.geometry.fmt].crash_marks or result.check_errors:
            raise _Broken(f"{result.corruptions} corruptions: " + "; ".join(result.messages[:5]))

    def _judge_by_qemu(self, state: CrashState, content: bytes) -> None:
        path = self.image.write_to(self.scratch, state.contents)
        judge(self.image.geometry, path, self.scratch, content)
        if self.image.geometry.snapshot:
            images.convert(path, "qcow2", self.scratch / "snapshot.raw", "raw", "-l", "first")
            if (self.scratch / "snapshot.raw").read_bytes() != self.image.guest:
                raise _Broken("the internal snapshot has changed")

    def _failure(self, state: CrashState, error: Exception) -> CrashFailure:
        where = ""
        if self.plan.keep is not None:
            folder = self.plan.keep / f"{self.image.geometry.name}-{self.seed}-{state.position}"
            folder.mkdir(parents=True, exist_ok=True)
            where = f"\nkept: {self.image.write_to(folder, state.contents)}"
        return CrashFailure(
            f"geometry {self.image.geometry.name}, seed {self.seed}, operations {self.plan.operations}: {state}\n"
            f"{type(error).__name__}: {error}{where}"
        )
