"""Counters of a node's requests (QEMU's BlockDeviceStats), which are kept from when somebody first asks for them.

A node that is not counted does nothing for them, not even a test: ``begin`` exchanges the forms of its requests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from nbdserve.block.forms import READ_DATA, READ_SPLIT, READ_ZERO
from nbdserve.block.pieces import Piece
from nbdserve.block.writer import WRITE_DONE, Done
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from nbdserve.block.node import Node


@dataclass(slots=True)
class Counter:
    """Of one kind of request: those that went well, their bytes, those that failed, and how long all of them took."""

    operations: int = 0
    bytes: int = 0
    failed: int = 0
    time_ns: int = 0

    def add(self, length: int, begun: int, *, failed: bool = False) -> None:
        """One request of ``length`` bytes that began at ``begun`` (``perf_counter_ns``) is over."""
        self.time_ns += perf_counter_ns() - begun
        if failed:
            self.failed += 1
        else:
            self.operations += 1
            self.bytes += length


class Counters:
    """All requests of a node, of clients as well as of jobs. Zeroing counts as writing; a flush has no bytes."""

    def __init__(self) -> None:
        self.read, self.write, self.flush, self.discard = Counter(), Counter(), Counter(), Counter()
        self.highest_end = 0
        """The largest end, a guest offset, of what was written."""

    def wrote(self, offset: int, length: int, begun: int, *, failed: bool = False) -> None:
        """A write is over."""
        self.write.add(length, begun, failed=failed)
        if not failed:
            self.highest_end = max(self.highest_end, offset + length)


def begin(node: Node) -> Counters:
    """The counters of ``node``, which count from here on if they have not before."""
    if node.counters is None:
        node.counters = counters = Counters()
        for name, kind in (("write", "write"), ("zero", "write"), ("discard", "discard"), ("read_pieces", "read")):
            setattr(node, name, _counted(counters, getattr(node, name), kind))
        node.flush = _counted_flush(counters, node.flush)  # type: ignore[method-assign]
        node.choose_forms()
    return node.counters


def _counted(counters: Counters, work: Callable[..., Awaitable[Any]], kind: str) -> Callable[..., Awaitable[Any]]:
    """The method ``work`` of a node; its second argument is a length or the bytes themselves."""
    counter: Counter = getattr(counters, kind)

    async def counted(offset: int, what: Any, **options: Any) -> Any:
        begun, failed = perf_counter_ns(), True
        length = what if isinstance(what, int) else len(what)
        try:
            result = await work(offset, what, **options)
            failed = False
        finally:
            if kind == "write":
                counters.wrote(offset, length, begun, failed=failed)
            else:
                counter.add(length, begun, failed=failed)
        return result

    return counted


def _counted_flush(counters: Counters, flush: Callable[[], Awaitable[None]]) -> Any:
    async def counted() -> None:
        begun, failed = perf_counter_ns(), True
        try:
            await flush()
            failed = False
        finally:
            counters.flush.add(0, begun, failed=failed)

    return counted


def count_forms(node: Node, counters: Counters) -> None:
    """Count what the present forms of the requests that do not wait answer; the others count for themselves."""
    read, read_pieces, locate = node.try_read_into, node.try_read_pieces, node.locate_read
    overwrite, submit = node.try_write, node.submit_write

    def try_read_into(offset: int, buffer: memoryview) -> int:
        begun = perf_counter_ns()
        outcome = read(offset, buffer)
        if outcome == READ_DATA:
            counters.read.add(len(buffer), begun)
        # Who is told of zeroes may ask once more, in the same way, but asks for pieces only once.
        return READ_SPLIT if outcome == READ_ZERO else outcome

    def try_read_pieces(offset: int, buffer: memoryview) -> list[Piece] | None:
        begun = perf_counter_ns()
        pieces = read_pieces(offset, buffer)
        if pieces is not None:
            counters.read.add(len(buffer), begun)
        return pieces

    def locate_read(offset: int, length: int) -> tuple[Storage, int] | None:
        begun = perf_counter_ns()
        place = locate(offset, length)
        if place is None or not place[0].can_send(place[1], length):
            return None  # it is read in another way, and counted then
        counters.read.add(length, begun)
        return place

    def try_write(offset: int, data: memoryview) -> bool:
        begun = perf_counter_ns()
        done = overwrite(offset, data)
        if done:
            counters.wrote(offset, len(data), begun)
        return done

    def submit_write(offset: int, data: memoryview, done: Done) -> int:
        begun, length = perf_counter_ns(), len(data)

        def ended(error: Exception | None) -> None:
            counters.wrote(offset, length, begun, failed=error is not None)
            done(error)

        outcome = submit(offset, data, ended)
        if outcome == WRITE_DONE:
            counters.wrote(offset, length, begun)
        return outcome

    node.try_read_into = try_read_into  # type: ignore[method-assign]
    node.try_read_pieces = try_read_pieces  # type: ignore[method-assign]
    node.locate_read = locate_read  # type: ignore[method-assign]
    node.try_write = try_write  # type: ignore[method-assign]
    node.submit_write = submit_write  # type: ignore[method-assign]
