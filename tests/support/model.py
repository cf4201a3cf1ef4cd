"""A model disk: for each 512-byte sector, what it may hold now and what it may hold after a crash.

Every write has a serial number, and a sector written by it holds nothing but (its own sector number, the serial), so
that what is read back says where and when it was written: data of another block is recognised with certainty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.units import SECTOR_SIZE

Kind: TypeAlias = Literal["write", "zero", "discard"]
ZEROES: Final = 0
"""The value of a sector of zeroes, whoever made it."""
UNKNOWN: Final = -1
_WORDS: Final = SECTOR_SIZE // 8
_TAG: Final = 0x5EC7_0000_0000_0000
"""Set in the sector number of a stamp, so that no stamp is zeroes."""
_TAG_MASK: Final = 0xFFFF_0000_0000_0000
_SPREAD: Final = 0x9E37_79B9_7F4A_7C15
"""Serials are stored multiplied by this odd number (mod 2^64), so that two of them differ in every byte."""
_UNSPREAD: Final = np.uint64(pow(_SPREAD, -1, 1 << 64))


class ModelError(AssertionError):
    """The disk holds what it must not."""


def stamps(serial: int, offset: int, length: int) -> bytes:
    """What write ``serial`` puts at ``[offset, offset + length)``."""
    if not length:
        return b""
    first, last = offset // SECTOR_SIZE, (offset + length - 1) // SECTOR_SIZE
    words = np.empty((last - first + 1, _WORDS), np.uint64)
    words[:, 0::2] = (np.arange(first, last + 1, dtype=np.uint64) | np.uint64(_TAG))[:, None]
    words[:, 1::2] = np.uint64(serial * _SPREAD % (1 << 64))
    skip = offset - first * SECTOR_SIZE
    return words.tobytes()[skip : skip + length]


@dataclass(slots=True, eq=False)
class Operation:
    """One change the guest asked for; times are those of the model's clock."""

    kind: Kind
    serial: int
    offset: int
    length: int
    issued: int
    values: dict[int, tuple[int, ...]]
    """Per sector, what it may hold once this is done."""
    completed: int | None = None

    @property
    def data(self) -> bytes:
        """The bytes of a ``write``."""
        return stamps(self.serial, self.offset, self.length)


class _Values:
    """The values there are; common to a model and its copies, so that no serial is given out twice."""

    def __init__(self) -> None:
        self.serial = 16
        self.mixed: dict[int, bytes] = {}
        """The content of sectors that more than one operation had a part in."""
        self.number_of: dict[bytes, int] = {}

    def next(self) -> int:
        self.serial += 1
        return self.serial

    def learn(self, content: bytes, sector: int) -> int:
        """The value of a sector with this content; a new one if nobody has made it yet."""
        if not any(content):
            return ZEROES
        number, spread = np.frombuffer(content, np.uint64, 2)
        serial = int(spread) * int(_UNSPREAD) % (1 << 64)
        if int(number) == sector | _TAG and content == stamps(serial, sector * SECTOR_SIZE, SECTOR_SIZE):
            return serial
        known = self.number_of.get(content)
        if known is None:
            known = self.number_of[content] = self.next()
            self.mixed[known] = content
        return known


class ModelDisk:
    """Follows the guest's operations. ``issue`` and ``complete`` may interleave in any way."""

    def __init__(self, size: int, initial: bytes = b"") -> None:
        self.size = size
        self.sectors = size // SECTOR_SIZE
        self.time = 0
        self._values = _Values()
        self.latest = np.zeros(self.sectors, np.int64)
        """What was issued last for each sector: one of the values it may hold, and nearly always the one it holds."""
        self.base = np.zeros(self.sectors, np.int64)
        """What each sector held, stable, before the operations in ``history``."""
        self.history: dict[int, list[Operation]] = {}
        if initial:
            self._set_initial(initial)

    def _set_initial(self, initial: bytes) -> None:
        content = initial[: self.size]
        content += bytes(-len(content) % SECTOR_SIZE)
        values = self._identify(content, 0, learn=True)
        self.base[: len(values)] = values
        self.latest[: len(values)] = values

    def copy(self) -> ModelDisk:
        """Another model of the same disk; it may follow this one's operations (``add``) or go its own way."""
        other = ModelDisk(self.size)
        other.time = self.time
        other._values = self._values
        other.latest, other.base = self.latest.copy(), self.base.copy()
        other.history = {sector: list(operations) for sector, operations in self.history.items()}
        return other

    # --- what happens --------------------------------------------------------------------------------------------

    def issue(self, kind: Kind, offset: int, length: int) -> Operation:
        """The guest sends an operation; it may reach the disk from now on, in part or not at all."""
        serial = self._values.next()
        values: dict[int, tuple[int, ...]] = {}
        end = offset + length
        for sector in range(offset // SECTOR_SIZE, -(-end // SECTOR_SIZE)):
            start = sector * SECTOR_SIZE
            new = serial if kind == "write" else ZEROES
            whole = offset <= start and start + SECTOR_SIZE <= end
            values[sector] = (new,) if whole else self._patched(sector, new, offset, end)
            if kind == "discard":
                values[sector] = tuple({*self.current(sector), *values[sector]})
        self.time += 1
        operation = Operation(kind, serial, offset, length, self.time, values)
        self.add(operation)
        return operation

    def add(self, operation: Operation) -> None:
        """Take note of an issued operation (as a follower does of the leader's)."""
        for sector, values in operation.values.items():
            self.history.setdefault(sector, []).append(operation)
            self.latest[sector] = values[0]

    def complete(self, operation: Operation, *, failed: bool = False) -> None:
        """The guest has the reply. After an error each sector holds the old or the new value."""
        self.time += 1
        if failed:
            for sector, values in operation.values.items():
                operation.values[sector] = tuple({*values, *self.current(sector)})
        operation.completed = self.time

    def begin_flush(self) -> int:
        """The guest sends a flush; the moment is handed to ``flushed``."""
        self.time += 1
        return self.time

    def flushed(self, begun: int) -> None:
        """A flush sent at ``begun`` was acknowledged: what was complete then is stable."""
        for sector in list(self.history):
            self._settle(sector, [op for op in self.history[sector] if _before(op.completed, begun)])

    def stable(self, operation: Operation) -> None:
        """A FUA operation was acknowledged: it, and nothing else, is stable."""
        for sector in operation.values:
            if operation in self.history.get(sector, ()):
                self._settle(sector, [operation])

    def _settle(self, sector: int, durable: list[Operation]) -> None:
        """Forget what is overwritten for good: everything that had completed before a durable operation was issued."""
        if not durable:
            return
        newest = max(op.issued for op in durable)
        left = [op for op in self.history[sector] if not _before(op.completed, newest)]
        only = left[0] if len(left) == 1 else None
        if only is not None and only in durable and len(only.values[sector]) == 1:
            self.base[sector] = only.values[sector][0]
            del self.history[sector]
            return
        self.base[sector] = UNKNOWN
        self.history[sector] = left

    # --- what may be there ---------------------------------------------------------------------------------------

    def current(self, sector: int) -> set[int]:
        """What a read of the sector may return now."""
        operations = self.history.get(sector)
        if not operations:
            return {int(self.base[sector])}
        newest = max((op.issued for op in operations if op.completed is not None), default=None)
        if newest is None:
            shown, base = operations, True
        else:
            shown, base = [op for op in operations if not _before(op.completed, newest)], False
        values = {value for op in shown for value in op.values[sector]}
        if base and self.base[sector] != UNKNOWN:
            values.add(int(self.base[sector]))
        return values

    def allowed_after_crash(self, sector: int) -> set[int]:
        """What the sector may hold if the power fails now."""
        values = {value for op in self.history.get(sector, ()) for value in op.values[sector]}
        if self.base[sector] != UNKNOWN:
            values.add(int(self.base[sector]))
        return values

    def check_crash(self, content: bytes | bytearray | memoryview) -> None:
        """Raise ModelError unless the whole disk's ``content`` is one a crash at this moment allows."""
        self._check(content, 0, self.allowed_after_crash)

    def check_read(self, content: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Raise ModelError unless ``content``, read now at ``offset``, is right. Both ends are whole sectors."""
        self._check(content, offset, self.current)

    def adopt(self, content: bytes | bytearray | memoryview, *, learn: bool = False) -> None:
        """Start afresh from ``content``, stable: what was found after a crash, or (``learn``) what others wrote."""
        values = self._identify(content, 0, learn=learn)
        if (values == UNKNOWN).any():
            raise ModelError("unknown content cannot be adopted")
        self.base = values
        self.latest = values.copy()
        self.history = {}

    def expected(self) -> bytes:
        """The content of the whole disk; every sector must be certain."""
        out = bytearray(self.size)
        for sector in range(self.sectors):
            values = self.current(sector)
            if len(values) != 1:
                raise ModelError(f"sector {sector} is uncertain: {values}")
            if value := values.pop():
                out[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE] = self.bytes_of(value, sector)
        return bytes(out)

    def resolve(self, content: bytes | bytearray | memoryview) -> None:
        """Take ``content``, read with nothing in flight, for the truth about what was uncertain (discarded sectors)."""
        self.check_read(content)
        self.adopt(content)

    # --- values --------------------------------------------------------------------------------------------------

    def bytes_of(self, value: int, sector: int) -> bytes:
        """The 512 bytes of a value at a sector."""
        if value == ZEROES:
            return bytes(SECTOR_SIZE)
        return self._values.mixed.get(value) or stamps(value, sector * SECTOR_SIZE, SECTOR_SIZE)

    def _patched(self, sector: int, value: int, offset: int, end: int) -> tuple[int, ...]:
        """The values of a sector that an operation changes in part."""
        start = sector * SECTOR_SIZE
        low, high = max(offset, start) - start, min(end, start + SECTOR_SIZE) - start
        new = self.bytes_of(value, sector)
        found = set()
        for old in self.current(sector):
            content = bytearray(self.bytes_of(old, sector))
            content[low:high] = new[low:high]
            found.add(self._values.learn(bytes(content), sector))
        return tuple(found)

    def _identify(
        self, content: bytes | bytearray | memoryview, first: int, *, learn: bool = False
    ) -> npt.NDArray[np.int64]:
        """The value of each sector; UNKNOWN for what was never issued for that sector."""
        words = np.frombuffer(content, np.uint64).reshape(-1, _WORDS)
        numbers = np.arange(first, first + len(words), dtype=np.uint64) | np.uint64(_TAG)
        uniform = (words[:, 2:] == words[:, :-2]).all(axis=1)
        own = uniform & (words[:, 0] == numbers)
        zero = uniform & (words[:, 0] == 0) & (words[:, 1] == 0)
        values = np.where(own, (words[:, 1] * _UNSPREAD).astype(np.int64), np.where(zero, ZEROES, UNKNOWN))
        for index in np.flatnonzero(~own & ~zero):
            sector = words[index].tobytes()
            if learn:
                values[index] = self._values.learn(sector, first + int(index))
            else:
                values[index] = self._values.number_of.get(sector, UNKNOWN)
        return values

    def _check(self, content: bytes | bytearray | memoryview, offset: int, allowed: Callable[[int], set[int]]) -> None:
        first = offset // SECTOR_SIZE
        values = self._identify(content, first)
        span = slice(first, first + len(values))
        wrong = []
        doubtful = values != self.latest[span]
        if allowed == self.allowed_after_crash:
            doubtful &= (values != self.base[span]) | (values == UNKNOWN)
        for index in np.flatnonzero(doubtful):
            sector = first + int(index)
            if int(values[index]) not in allowed(sector):
                wrong.append(sector)
        if wrong:
            raise ModelError(self._describe(sorted(wrong), content, first, values, allowed))

    def _describe(
        self,
        wrong: list[int],
        content: bytes | bytearray | memoryview,
        first: int,
        values: npt.NDArray[np.int64],
        allowed: Callable[[int], set[int]],
    ) -> str:
        lines = [f"{len(wrong)} wrong sectors (of what was asked, {first} on):"]
        for sector in wrong[:8]:
            at = (sector - first) * SECTOR_SIZE
            found = self._name(int(values[sector - first]), bytes(content[at : at + SECTOR_SIZE]))
            wanted = ", ".join(str(v) for v in sorted(allowed(sector)))
            recent = ", ".join(
                f"{op.kind} {op.serial} @{op.offset:#x}+{op.length:#x} issued {op.issued} done {op.completed}"
                for op in self.history.get(sector, [])[-4:]
            )
            where = f"sector {sector} ({sector * SECTOR_SIZE:#x})"
            lines.append(f"  {where}: found {found}; allowed {wanted}; recent: {recent or 'none'}")
        return "\n".join(lines)

    def _name(self, value: int, content: bytes) -> str:
        if value == ZEROES:
            return "zeroes"
        if value != UNKNOWN:
            return f"value {value}"
        words = np.frombuffer(content, np.uint64)
        owners = {
            (int(a) & ~_TAG_MASK, int(b) * int(_UNSPREAD) % (1 << 64))
            for a, b in zip(words[0::2], words[1::2], strict=True)
            if (int(a) & _TAG_MASK) == _TAG
        }
        if owners:
            return "FOREIGN DATA of " + ", ".join(f"(sector {s}, write {w})" for s, w in sorted(owners)[:3])
        return f"UNKNOWN BYTES {content[:16].hex()}.."


def _before(completed: int | None, moment: int) -> bool:
    return completed is not None and completed < moment
