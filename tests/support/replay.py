"""Every state in which a power failure could have left recorded storages.

What was flushed is there. Of what was not, each 512-byte sector is there or not, in any combination that respects
that a sector holds one value at a time; growth that was not flushed may be lost whatever else is there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nbdserve.units import SECTOR_SIZE, align_up
from tests.support.recording import Barrier, Change, LogEntry, Note, Recorder, apply_change, apply_range, resize

KINDS = ("prefix", "lost", "one lost", "one only", "last only", "subset", "torn", "torn last", "growth lost")


@dataclass(slots=True)
class CrashState:
    """What one crash left, and where."""

    position: int
    """The log entries before this one had happened."""
    kind: str
    contents: list[bytearray]
    kept: list[str]
    """The unsynced changes that survived, for the report of a failure."""

    def __str__(self) -> str:
        kept = ", ".join(self.kept[:40]) or "none"
        return f"crash at {self.position} ({self.kind}), survivors of the unsynced: {kept}"


class Replay:
    """Walks a recorder's log with a model that follows the guest's view, and makes crash states on the way."""

    def __init__(self, recorder: Recorder, model: Any, seed: int) -> None:
        self.log: list[LogEntry] = recorder.log
        self.model = model
        self.rng = random.Random(seed)
        self.stable = [bytearray(content) for content in recorder.initial]
        self.pending: list[Change] = []

    def states(self, budget: int) -> Iterator[CrashState]:
        """About ``budget`` states spread over the log; ``model`` is at the moment of each while it is looked at."""
        points = sum(1 for entry in self.log if self._is_point(entry))
        self._clear_masks()
        per_point = budget / max(1, points)
        owed = 0.0
        for position, entry in enumerate(self.log, 1):
            self._advance(entry)
            if not self._is_point(entry):
                continue
            owed += per_point
            if owed < 1:
                continue
            kinds = self._kinds(int(owed), after_promise=isinstance(entry, Note))
            owed -= int(owed)
            for kind in kinds:
                yield self._state(position, kind)

    @staticmethod
    def _is_point(entry: LogEntry) -> bool:
        return isinstance(entry, Change) or (isinstance(entry, Note) and entry.acknowledges)

    def _kinds(self, count: int, *, after_promise: bool) -> list[str]:
        """Prefixes come first (one state a point takes all of them); promises are tried empty-handed."""
        if not self.pending:
            return ["lost"]
        first = ["lost"] if after_promise else ["prefix"]
        return first + [self.rng.choice(KINDS) for _ in range(count - 1)]

    def _clear_masks(self) -> None:
        for entry in self.log:
            if isinstance(entry, Change):
                entry.masked = []

    def _advance(self, entry: LogEntry) -> None:
        if isinstance(entry, Change):
            self.pending.append(entry)
        elif isinstance(entry, Note):
            entry.apply(self.model)
        else:
            self._settle(entry)

    def _settle(self, barrier: Barrier) -> None:
        waiting: list[Change] = []
        for change in self.pending:
            covered = change.completed is not None and change.completed <= barrier.begun
            if change.store != barrier.store or not covered:
                waiting.append(change)
                continue
            apply_change(self.stable[change.store], change)
            if change.kind in ("write", "zero"):
                end = change.offset + change.length
                for older in waiting:
                    overlaps = older.offset < end and change.offset < older.offset + older.length
                    if older.store == change.store and overlaps:
                        older.masked.append((change.offset, end))
        self.pending = waiting

    def _state(self, position: int, kind: str) -> CrashState:
        contents = [bytearray(content) for content in self.stable]
        rng, pending = self.rng, self.pending
        count = len(pending)
        whole: set[int] = set()
        torn: set[int] = set()
        if kind in ("prefix", "torn last"):
            whole = set(range(count))
            if kind == "torn last":
                whole.discard(count - 1)
                torn = {count - 1}
        elif kind == "one lost":
            whole = set(range(count)) - {rng.randrange(count)}
        elif kind == "one only":
            whole = {rng.randrange(count)}
        elif kind == "last only":
            whole = {count - 1}
        elif kind in ("subset", "growth lost"):
            share = rng.choice((0.1, 0.3, 0.5, 0.7, 0.9))
            whole = {i for i in range(count) if rng.random() < share}
        elif kind == "torn":
            share = rng.choice((0.2, 0.5, 0.8))
            chosen = {i for i in range(count) if rng.random() < share}
            torn = {i for i in chosen if rng.random() < 0.5}
            whole = chosen - torn
        kept = []
        for i, change in enumerate(pending):
            if i in whole:
                apply_change(contents[change.store], change)
                kept.append(str(change))
            elif i in torn:
                self._tear(contents[change.store], change)
                kept.append(f"torn {change}")
        if kind == "growth lost":
            for content, stable in zip(contents, self.stable, strict=True):
                size = align_up(len(stable), SECTOR_SIZE)  # the cut leaves no sector in two parts
                if len(content) > size:
                    resize(content, size)
        return CrashState(position, kind, contents, kept)

    def _tear(self, content: bytearray, change: Change) -> None:
        """Keep some of the 512-byte sectors of a change: a head, a tail, or any."""
        if change.kind in ("truncate", "extend"):
            if self.rng.random() < 0.5:
                apply_change(content, change)
            return
        end = change.offset + change.length
        first = change.offset // SECTOR_SIZE
        sectors = -(-end // SECTOR_SIZE) - first
        way = self.rng.randrange(3)
        if way == 0:
            spans = [(0, self.rng.randrange(sectors + 1))]
        elif way == 1:
            spans = [(self.rng.randrange(sectors + 1), sectors)]
        else:
            spans = [(i, i + 1) for i in range(sectors) if self.rng.random() < 0.5]
        data = change.data if change.kind == "write" else None
        for low, high in spans:
            start = max(change.offset, (first + low) * SECTOR_SIZE)
            stop = min(end, (first + high) * SECTOR_SIZE)
            if start < stop:
                apply_range(content, change, data, start, stop)
