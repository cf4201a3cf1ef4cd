"""An incremental backup as backup programs make it: ``/usr/bin/python3 libnbd_backup.py URI CONTEXT TARGET``.

Brings TARGET, a raw copy of an earlier moment, up to date: what the dirty bitmap CONTEXT marks is read, or zeroed where
base:allocation says so. Prints the number of bytes brought over. The bindings belong to the system's Python, so this
file is a script of its own and imports nothing of the project.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import nbd

BASE = "base:allocation"
LONGEST = 1 << 20
READS_ZERO = 2
DIRTY = 1


def changes(handle: nbd.NBD, context: str) -> list[tuple[int, int, bool]]:
    """``(offset, length, zero)`` of what is dirty. Both contexts are walked side by side, as their replies come."""
    found: list[tuple[int, int, bool]] = []
    position, size = 0, handle.get_size()
    while position < size:
        seen: dict[str, list[int]] = {}

        def extent(name: str, offset: int, entries: list[int], error: object, seen: dict[str, list[int]] = seen) -> int:
            seen[name] = entries
            return 0

        handle.block_status(size - position, position, extent)
        ends = {name: sum(entries[::2]) for name, entries in seen.items()}
        assert len(ends) == 2, f"asked for two contexts, answered for {list(ends)}"
        assert len(set(ends.values())) == 1, f"the contexts end at different places: {ends}"
        found += merged(position, seen[context], seen[BASE])
        position += ends[BASE]
    return found


def merged(start: int, dirty: list[int], base: list[int]) -> list[tuple[int, int, bool]]:
    """The dirty extents, cut where the other context changes."""
    edges: set[int] = set()
    for entries in (dirty, base):
        at = start
        for length in entries[::2]:
            edges.add(at)
            at += length
        edges.add(at)
    points = sorted(edges)
    result = []
    for at, end in pairwise(points):
        if status_at(dirty, start, at) & DIRTY:
            result.append((at, end - at, bool(status_at(base, start, at) & READS_ZERO)))
    return result


def status_at(entries: list[int], start: int, position: int) -> int:
    for length, status in zip(entries[::2], entries[1::2], strict=True):
        start += length
        if position < start:
            return status
    raise AssertionError(f"nothing is said of {position}")


def main(uri: str, context: str, target: str) -> None:
    handle = nbd.NBD()
    handle.add_meta_context(BASE)
    handle.add_meta_context(context)
    handle.connect_uri(uri)
    assert handle.can_meta_context(context), f"{context} is not offered"
    brought = 0
    with open(target, "r+b") as file:
        for offset, length, zero in changes(handle, context):
            for at in range(offset, offset + length, LONGEST):
                part = min(LONGEST, offset + length - at)
                file.seek(at)
                file.write(bytes(part) if zero else handle.pread(part, at))
                brought += part
    handle.shutdown()
    print(brought)


main(*sys.argv[1:])
