"""``python -m tests.crash.changes``: power failures while an image is changed as a whole: its size, bitmaps, form.

Between the changes a guest writes and flushes. A state left by a failure inside a change has the disk, each snapshot
and all stored bitmaps as they were before or as they are after it, and no metadata worse than leaked clusters.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.node import Node
from nbdserve.errors import ConfigError, RequestError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.units import SECTOR_SIZE
from tests.support import images
from tests.support.geometries import CRASH_GEOMETRIES, KITS, Geometry, Image, build, judge
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import CrashState, Replay
from tests.support.unlocking import remembered_keys
from tests.support.workload import read_all


class ChangeFailure(AssertionError):
    """A state is neither the one before the change nor the one after it."""


@dataclass(frozen=True)
class Stored:
    """A bitmap stored in the image."""

    name: str
    granularity: int
    disabled: bool
    octets: bytes

    @classmethod
    def of(cls, bitmap: DirtyBitmap) -> Stored:
        """As ``bitmap`` is now."""
        return cls(bitmap.name or "", bitmap.granularity, bitmap.disabled, bytes(bitmap.bits.octets))

    def resized(self, old: int, size: int) -> Stored:
        """As it is when the disk has another size."""
        bitmap = DirtyBitmap(self.name, old, self.granularity)
        bitmap.bits.load(0, self.octets)
        bitmap.disabled = self.disabled
        bitmap.resize(size)
        return Stored.of(bitmap)


def _shown(bitmaps: Sequence[Stored]) -> str:
    found = [f"{each.name} ({each.granularity}, {hash(each.octets):x})" for each in bitmaps]
    return ", ".join(found) or "none"


@dataclass(frozen=True)
class View:
    """What a user sees of an image."""

    disk: bytes
    snapshots: tuple[tuple[str, bytes], ...] = ()
    """By id, with the content."""
    bitmaps: tuple[Stored, ...] = ()

    def __str__(self) -> str:
        names = [name for name, _ in self.snapshots]
        return f"disk of {len(self.disk)}, snapshots {', '.join(names) or 'none'}, bitmaps {_shown(self.bitmaps)}"


@dataclass
class Allowed:
    """The views a crash may leave at this moment of the log; none while a guest writes."""

    views: tuple[View, ...] = ()
    change: str = ""


@dataclass
class Tally:
    """What was done."""

    states: int = 0
    leaky: int = 0
    after: int = 0
    """States that have the change."""
    judged_by_qemu: int = 0
    continued: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    sites: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Sum up."""
        for name in ("states", "leaky", "after", "judged_by_qemu", "continued"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.changes += other.changes
        self.sites += other.sites


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    changes: int = 5
    states: int = 100
    qemu_every: int = 10
    continue_every: int = 10
    ignored_site: str | None = None
    kinds: frozenset[str] | None = None
    """Of the changes; None: all there are."""


def can_change(geometry: Geometry) -> bool:
    """Whether there is a change to be made of such an image."""
    driver = driver_for(geometry.fmt)
    return not geometry.noise and (driver.can("resize") or driver.can("create_snapshot"))


def run_changes(geometry: Geometry, seed: int, plan: Plan) -> Tally:
    """One image, some changes, their crash states. ChangeFailure at the first that is wrong."""
    with tempfile.TemporaryDirectory(dir=images.SCRATCH) as name, remembered_keys():
        return asyncio.run(_Run(build(geometry, seed % 4), seed, plan, Path(name)).run())


class _Run:
    def __init__(self, image: Image, seed: int, plan: Plan, scratch: Path) -> None:
        self.image, self.seed, self.plan, self.scratch = image, seed, plan, scratch
        self.rng = random.Random(f"changes/{image.geometry.name}/{seed}")
        self.tally = Tally()
        self.number = 0

    async def run(self) -> Tally:
        recorder = Recorder(self.rng.getrandbits(32), ignored_site=self.plan.ignored_site)
        stores = [recorder.storage(content) for content in self.image.contents]
        node = await self.image.open(stores, keep_bitmaps=True)
        view = await self._view(node)
        for _ in range(self.plan.changes):
            view = await self._guest(node, view)
            view = await self._change(node, view, recorder)
            node = Node(node.layers, unmap=True)  # what it remembers of the mapping is void
        self.tally.sites.update(recorder.sites)
        allowed = Allowed()
        for state in Replay(recorder, allowed, self.rng.getrandbits(32)).states(self.plan.states):
            if not allowed.views:
                continue
            self.tally.states += 1
            try:
                await self._judge(state, allowed)
            except Exception as error:
                raise ChangeFailure(
                    f"geometry {self.image.geometry.name}, seed {self.seed}: {state}, in {allowed.change}\n"
                    f"{type(error).__name__}: {error}"
                ) from error
        return self.tally

    async def _guest(self, node: Node, view: View) -> View:
        disk = bytearray(view.disk)
        for _ in range(self.rng.randrange(1, 6)):
            if not disk:
                break
            sectors = len(disk) // SECTOR_SIZE
            length = min(sectors, int(2 ** (self.rng.random() * min(sectors, 128).bit_length()))) * SECTOR_SIZE
            offset = self.rng.randrange((len(disk) - length) // SECTOR_SIZE + 1) * SECTOR_SIZE
            self.number += 1
            if self.rng.random() < 0.2:
                disk[offset : offset + length] = bytes(length)
                await node.zero(offset, length, unmap=self.rng.random() < 0.5)
            else:
                data = self.number.to_bytes(4, "big") * (length // 4)
                disk[offset : offset + length] = data
                await node.write(offset, memoryview(data))
        await node.flush()
        return replace(view, disk=bytes(disk))

    async def _change(self, node: Node, view: View, recorder: Recorder) -> View:
        top: Any = node.top
        options: list[tuple[str, Callable[[], Awaitable[Any]], View]] = []
        if top.can("resize"):
            options += [self._resize(node, view) for _ in range(2)]
        if top.can("create_snapshot"):
            options.append(("create", lambda: top.create_snapshot("s"), view))
            for name, content in view.snapshots:
                left = tuple(pair for pair in view.snapshots if pair[0] != name)
                without, applied = replace(view, snapshots=left), View(content, view.snapshots)
                options.append(("delete", lambda name=name: top.delete_snapshot(name), without))  # type: ignore[misc]
                options.append(("apply", lambda name=name: top.apply_snapshot(name), applied))  # type: ignore[misc]
        if top.can("amend"):
            chosen = self.rng.choice(("compat=0.10", "compat=1.1", "refcount_bits=16", "refcount_bits=32"))
            name, _, value = chosen.partition("=")
            options.append((f"amend {chosen}", lambda: top.amend({name: value}), view))
        if await top.stored_bitmaps() is not None:
            options.append(self._bitmaps(top, view))
        kind, act, after = self.rng.choice(
            [option for option in options if self.plan.kinds is None or option[0] in self.plan.kinds]
        )
        if kind == "create":
            new = max((int(name) for name, _ in view.snapshots), default=0) + 1
            after = replace(view, snapshots=(*view.snapshots, (str(new), view.disk)))
        recorder.note(lambda allowed: (setattr(allowed, "views", (view, after)), setattr(allowed, "change", kind)))
        done, seen = True, after
        try:
            await act()
        except (ConfigError, RequestError):
            done, seen = False, view  # a size or snapshot it cannot have
        recorder.note(lambda allowed: setattr(allowed, "views", (seen,)), acknowledges=True)
        recorder.note(lambda allowed: setattr(allowed, "views", ()))
        self.tally.changes[kind if done else f"{kind} refused"] += 1
        return seen

    def _resize(self, node: Node, view: View) -> tuple[str, Callable[[], Awaitable[Any]], View]:
        limit = 2 * self.image.size
        size = self.rng.choice(
            (
                len(view.disk) + SECTOR_SIZE * self.rng.randrange(-20, 20),
                SECTOR_SIZE * self.rng.randrange(1, limit // SECTOR_SIZE),
            )
        )
        size = max(SECTOR_SIZE, min(limit, size))
        disk, bitmaps = view.disk[:size].ljust(size, b"\0"), view.bitmaps
        if size != len(view.disk):
            bitmaps = tuple(bitmap.resized(len(view.disk), size) for bitmap in bitmaps)
        after = View(disk, view.snapshots, bitmaps)
        return "grow" if size > len(view.disk) else "shrink", lambda: node.resize(size), after

    def _bitmaps(self, top: Any, view: View) -> tuple[str, Callable[[], Awaitable[Any]], View]:
        """Some are stored anew, and some removed."""
        changes: dict[str, DirtyBitmap | None] = {}
        after = {bitmap.name: bitmap for bitmap in view.bitmaps}
        for name in self.rng.sample("abcd", self.rng.randrange(1, 4)):
            changes[name] = None
            if name in after and self.rng.random() < 0.4:
                del after[name]
                continue
            bitmap = changes[name] = DirtyBitmap(name, len(view.disk), 512 << self.rng.randrange(4))
            bitmap.disabled = self.rng.random() < 0.5
            for _ in range(self.rng.randrange(4)):
                offset = self.rng.randrange(len(view.disk))
                bitmap.set(offset, self.rng.randrange(1, len(view.disk) - offset + 1))
            after[name] = Stored.of(bitmap)
        return "bitmaps", lambda: top.store_bitmaps(changes), replace(view, bitmaps=tuple(after.values()))

    async def _view(self, node: Node) -> View:
        snapshots = (("1", self.image.guest),) if self.image.geometry.snapshot else ()
        return View(await read_all(node, node.size), snapshots)

    async def _judge(self, state: CrashState, allowed: Allowed) -> None:
        node = await self._open(state, read_only=True)
        disk = await read_all(node, node.size)
        names = tuple(snapshot.id for snapshot in node.top.info().snapshots)
        bitmaps = await _stored(node.top)
        fitting = [
            view
            for view in allowed.views
            if (view.disk, view.bitmaps, tuple(n for n, _ in view.snapshots)) == (disk, bitmaps, names)
        ]
        if not fitting:
            expected = " or ".join(map(str, allowed.views))
            raise ChangeFailure(
                f"found a disk of {len(disk)}, snapshots {names}, bitmaps {_shown(bitmaps)}; expected {expected}"
            )
        self.tally.after += fitting[0] is allowed.views[-1]
        if node.top.can("check"):
            result = await node.top.check()
            self.tally.leaky += bool(result.leaks)
            if result.corruptions > KITS[self.image.geometry.fmt].crash_marks or result.check_errors:
                raise ChangeFailure(f"{result.corruptions} corruptions: " + "; ".join(result.messages[:5]))
        await node.close()
        await self._judge_snapshots(state, fitting[0])
        if self.tally.states % self.plan.qemu_every == 0 and not self.image.geometry.encryption:
            self.tally.judged_by_qemu += 1
            judge(self.image.geometry, self.image.write_to(self.scratch, state.contents), self.scratch, disk)
        if self.tally.states % self.plan.continue_every == 0:
            self.tally.continued += 1
            await self._continue(state, disk, fitting[0])

    async def _judge_snapshots(self, state: CrashState, view: View) -> None:
        for name, content in view.snapshots:
            if self.rng.random() < 0.3:
                layers = await self._open(state, read_only=True, snapshot=name)
                if await read_all(layers, layers.size) != content:
                    raise ChangeFailure(f"snapshot {name} has changed")
                await layers.close()

    async def _continue(self, state: CrashState, disk: bytes, view: View) -> None:
        """Used on, the image is as good as any."""
        stores = [ByteStorage(bytearray(content)) for content in state.contents]
        node = await self.image.open(stores)
        after = await self._guest(node, View(disk, view.snapshots))
        if await read_all(node, node.size) != after.disk:
            raise ChangeFailure("what is written after the crash does not read back")
        await node.close()
        left = CrashState(state.position, "used on", [store.content for store in stores], [])
        await self._judge_snapshots(left, after)

    async def _open(self, state: CrashState, *, read_only: bool, snapshot: str | None = None) -> Node:
        stores = [ByteStorage(bytearray(content)) for content in state.contents]
        if snapshot is None:
            return await self.image.open(stores, read_only=read_only)
        options = {"companions": stores[1:], "secret": self.image.geometry.secret or None, "snapshot": snapshot}
        top = await driver_for(self.image.geometry.fmt).open(stores[0], options, read_only=True)
        below = await self.image.open([ByteStorage(bytearray(content)) for content in state.contents], read_only=True)
        return Node([top, *below.layers[1:]])


async def _stored(layer: FormatDriver) -> tuple[Stored, ...]:
    found = []
    for info in await layer.stored_bitmaps() or ():
        bitmap = await layer.stored_bitmap(info.name)
        assert bitmap is not None
        found.append(Stored.of(bitmap))
    return tuple(found)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.changes", description=__doc__)
    parser.add_argument("--format", default="qcow2", choices=("all", *KITS))
    parser.add_argument("--geometry", action="append")
    parser.add_argument("--states", type=int, default=2000)
    parser.add_argument("--states-per-run", type=int, default=100)
    parser.add_argument("--changes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", help="only such changes (may be given again)")
    options = parser.parse_args(arguments)
    chosen = [
        geometry
        for geometry in CRASH_GEOMETRIES
        if options.format in ("all", geometry.fmt)
        and (not options.geometry or geometry.name in options.geometry)
        and can_change(geometry)
    ]
    plan = Plan(options.changes, options.states_per_run, kinds=frozenset(options.kind) if options.kind else None)
    total, failures, seed, started = Tally(), 0, options.seed, time.monotonic()
    while total.states < options.states and failures < 10:
        for geometry in chosen:
            try:
                total.add(run_changes(geometry, seed, plan))
            except Exception as error:
                failures += 1
                print(f"--- {geometry.name} seed {seed}: {type(error).__name__}: {error}", flush=True)
        seed += 1
    print(
        f"{total.states} states in {time.monotonic() - started:.0f} s over {len(chosen)} geometries: "
        f"{total.after} with the change, {total.leaky} with leaks, "
        f"{total.judged_by_qemu} judged by qemu-img, {total.continued} used on; "
        f"{failures} failed runs"
    )
    print("changes: " + ", ".join(f"{kind} {count}" for kind, count in total.changes.most_common()))
    print("barriers: " + ", ".join(f"{site} {count}" for site, count in total.sites.most_common()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
