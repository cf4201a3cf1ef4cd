"""Making, applying and deleting internal snapshots, each in one step (see ``rewrite``).

All of these work on the file of an idle image; a driver that has it open takes its tables from there anew.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from nbdserve.errors import ConfigError, ImageError, RequestError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.bitmap_directory import read_bitmap_directory
from nbdserve.formats.qcow2.check_walk import UInt64Array, read_words
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.rewrite import read_state, replace_tables
from nbdserve.formats.qcow2.snapshots import MAX_TABLE_BYTES, NO_ICOUNT, SNAPSHOT_EXTRA, Snapshot, find_snapshot
from nbdserve.formats.qcow2.table_plan import State
from nbdserve.storage.base import Storage
from nbdserve.units import div_ceil

MAX_NAME_BYTES: Final = 255
"""QEMU's limit."""


async def create_snapshot(
    storage: Storage, name: str, *, icount: int | None = None, now_ns: int | None = None
) -> Snapshot:
    """Keep the disk as it is under ``name``, which may be that of another snapshot too; ids are unique.

    The active disk gets L2 tables of its own, the snapshot keeps those there are. ``now_ns`` is the time, since 1970;
    ``icount`` the instructions a virtual machine has executed. RequestError(ENOTSUP) with an external data file,
    ConfigError for a name or number of snapshots that cannot be.
    """
    old = await _state(storage)
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_NAME_BYTES:
        raise ConfigError(f"{storage.path}: the name of a snapshot has at most {MAX_NAME_BYTES} bytes: {name!r}")
    header = old.header
    seconds, nanoseconds = divmod(time.time_ns() if now_ns is None else now_ns, 1_000_000_000)
    snapshot = Snapshot(
        l1_offset=header.l1_offset,
        l1_entries=header.l1_entries,
        id=_new_id(old.snapshots),
        name=name,
        date_sec=seconds,
        date_nsec=nanoseconds,
        vm_clock_nsec=0,
        vm_state_size=0,
        disk_size=header.size,
        icount=icount,
        extra=SNAPSHOT_EXTRA.build(
            {"vm_state_size": 0, "disk_size": header.size, "icount": NO_ICOUNT if icount is None else icount}
        ),
    )
    snapshots = [*old.snapshots, snapshot]
    if len(snapshots) > layout.MAX_SNAPSHOTS or sum(len(each.build()) for each in snapshots) > MAX_TABLE_BYTES:
        raise ConfigError(f"{storage.path}: there is no room for another snapshot, there are {len(old.snapshots)}")
    await replace_tables(storage, old, State(_known_bits(header), old.l1, snapshots))
    return snapshot


def _new_id(snapshots: Sequence[Snapshot]) -> str:
    numbers = [int(snapshot.id) for snapshot in snapshots if snapshot.id.isascii() and snapshot.id.isdigit()]
    return str(max(numbers, default=0) + 1)


async def apply_snapshot(storage: Storage, wanted: str) -> None:
    """Make the active disk what it was, of the size it had, in the snapshot with this id, or else this name.

    What the active disk has now is lost. Errors as of ``create_snapshot``, and ImageError where there is none;
    ConfigError while bitmaps are stored, which say what has changed on the disk there is.
    """
    old = await _state(storage)
    header = old.header
    if bitmaps := await read_bitmap_directory(storage, header):
        names = ", ".join(bitmap.name for bitmap in bitmaps[:16])
        raise ConfigError(f"{storage.path}: Device has active dirty bitmaps: remove them first ({names})")
    snapshot = find_snapshot(old.snapshots, wanted, header, storage.path)
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    entries = max(snapshot.l1_entries, div_ceil(size, header.l2_coverage))
    l1: UInt64Array = np.zeros(entries, np.uint64)
    l1[: snapshot.l1_entries] = await read_words(storage, snapshot.l1_offset, snapshot.l1_entries)
    autoclear = header.autoclear & layout.AUTOCLEAR_DATA_FILE_RAW
    await replace_tables(storage, old, State(replace(header, size=size, autoclear=autoclear), l1, old.snapshots))


async def delete_snapshot(storage: Storage, snapshot_id: str) -> None:
    """Forget the snapshot with this id; what nothing else uses is free. Errors as of ``apply_snapshot``."""
    old = await _state(storage)
    left = [snapshot for snapshot in old.snapshots if snapshot.id != snapshot_id]
    if len(left) == len(old.snapshots):
        raise ImageError(storage.path, "no such internal snapshot", field="snapshot id", value=snapshot_id)
    await replace_tables(storage, old, State(_known_bits(old.header), old.l1, left))


async def _state(storage: Storage) -> State:
    state = await read_state(storage)
    if state.header.has_data_file:
        raise RequestError(
            errno.ENOTSUP, f"{storage.path}: images with an external data file have no internal snapshots"
        )
    return state


def _known_bits(header: Header) -> Header:
    """The disk stays what it is, so bitmaps stay right; what unknown bits stand for may not."""
    return replace(header, autoclear=header.autoclear & layout.AUTOCLEAR_KNOWN)
