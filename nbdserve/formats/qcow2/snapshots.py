"""Internal snapshots: the snapshot table, and which snapshot a user means (docs/interop/qcow2.rst, "Snapshots")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, ImageError
from nbdserve.formats.base import SnapshotInfo
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import MAX_L1_BYTES, in_range, table_inside
from nbdserve.storage.base import Storage
from nbdserve.units import KIB, MIB

MAX_TABLE_BYTES: Final = 64 * MIB
MAX_EXTRA_BYTES: Final = 1024
NO_ICOUNT: Final = (1 << 64) - 1
"""``icount`` of a snapshot that has none."""

SNAPSHOT_HEAD: Final[Any] = c.Struct(
    "l1_offset" / c.Int64ub,
    "l1_entries" / c.Int32ub,
    "id_length" / c.Int16ub,
    "name_length" / c.Int16ub,
    "date_sec" / c.Int32ub,
    "date_nsec" / c.Int32ub,
    "vm_clock_nsec" / c.Int64ub,
    "vm_state_size" / c.Int32ub,
    "extra_length" / c.Int32ub,
)
SNAPSHOT_EXTRA: Final[Any] = c.Struct("vm_state_size" / c.Int64ub, "disk_size" / c.Int64ub, "icount" / c.Int64ub)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An entry of the snapshot table: an L1 table of its own, with the disk size it had then."""

    l1_offset: int
    l1_entries: int
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int | None
    """Bytes; None in an entry without extra data (version 2): the size of the active disk."""
    icount: int | None
    extra: bytes
    """The extra data as stored."""

    @classmethod
    def parse(cls, data: bytes | bytearray, at: int, path: str) -> tuple[Snapshot, int] | None:
        """The entry at ``at`` of the table and where the next begins; None if ``data`` ends before it does."""
        if at + SNAPSHOT_HEAD.sizeof() > len(data):
            return None
        head = SNAPSHOT_HEAD.parse(bytes(data[at : at + SNAPSHOT_HEAD.sizeof()]))
        in_range(path, "extra_data_size of a snapshot", head.extra_length, 0, MAX_EXTRA_BYTES)
        extra_at = at + SNAPSHOT_HEAD.sizeof()
        id_at = extra_at + head.extra_length
        name_at = id_at + head.id_length
        end = name_at + head.name_length
        if end > len(data):
            return None
        extra = bytes(data[extra_at:id_at])
        known = SNAPSHOT_EXTRA.parse(extra[: SNAPSHOT_EXTRA.sizeof()].ljust(SNAPSHOT_EXTRA.sizeof(), b"\0"))
        return cls(
            l1_offset=head.l1_offset,
            l1_entries=head.l1_entries,
            id=bytes(data[id_at:name_at]).decode("utf-8", "surrogateescape"),
            name=bytes(data[name_at:end]).decode("utf-8", "surrogateescape"),
            date_sec=head.date_sec,
            date_nsec=head.date_nsec,
            vm_clock_nsec=head.vm_clock_nsec,
            vm_state_size=known.vm_state_size if len(extra) >= 8 else head.vm_state_size,
            disk_size=known.disk_size if len(extra) >= 16 else None,
            icount=known.icount if len(extra) >= 24 and known.icount != NO_ICOUNT else None,
            extra=extra,
        ), end + -(end - at) % 8

    def build(self) -> bytes:
        """The entry, padded to a multiple of 8 bytes."""
        name, identifier = (text.encode("utf-8", "surrogateescape") for text in (self.name, self.id))
        head = SNAPSHOT_HEAD.build(
            {
                "l1_offset": self.l1_offset,
                "l1_entries": self.l1_entries,
                "id_length": len(identifier),
                "name_length": len(name),
                "date_sec": self.date_sec,
                "date_nsec": self.date_nsec,
                "vm_clock_nsec": self.vm_clock_nsec,
                "vm_state_size": min(self.vm_state_size, (1 << 32) - 1),
                "extra_length": len(self.extra),
            }
        )
        data: bytes = head + self.extra + identifier + name
        return data + bytes(-len(data) % 8)


async def read_snapshots(storage: Storage, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshot table and its length in bytes. CorruptImageError where an entry or its L1 table is impossible."""
    snapshots: list[Snapshot] = []
    if header.snapshot_count == 0:
        return snapshots, 0
    limit = min(MAX_TABLE_BYTES, storage.size - header.snapshots_offset)
    data, at = bytearray(), 0
    while len(snapshots) < header.snapshot_count:
        parsed = Snapshot.parse(data, at, storage.path)
        if parsed is None:
            if len(data) >= limit:
                raise CorruptImageError(
                    storage.path,
                    f"the snapshot table ends after {len(snapshots)} entries (at most 64 MiB, inside the file)",
                    field="nb_snapshots",
                    value=header.snapshot_count,
                )
            more = min(limit - len(data), max(64 * KIB, len(data)))
            data += await storage.read(header.snapshots_offset + len(data), more)
            continue
        snapshot, at = parsed
        what = f"of snapshot {snapshot.id!r}"
        in_range(storage.path, f"l1_size {what}", snapshot.l1_entries, 0, MAX_L1_BYTES // 8)
        table_inside(
            storage.path,
            f"l1_table_offset {what}",
            snapshot.l1_offset,
            snapshot.l1_entries * 8,
            cluster_size=header.cluster_size,
            file_size=storage.size,
        )
        snapshots.append(snapshot)
    return snapshots, at


def find_snapshot(snapshots: Sequence[Snapshot], wanted: str, header: Header, path: str) -> Snapshot:
    """The snapshot whose id, or else whose name, is ``wanted``; ImageError when there is none or it is unusable."""
    found = next((s for s in snapshots if s.id == wanted), None) or next(
        (s for s in snapshots if s.name == wanted), None
    )
    if found is None:
        known = ", ".join(f"{s.id} ({s.name})" for s in snapshots[:16]) or "none"
        raise ImageError(path, "no such internal snapshot", field="snapshot", value=wanted, hint=f"there are: {known}")
    size = header.size if found.disk_size is None else found.disk_size
    if size >= 1 << 63 or found.l1_entries * header.l2_coverage < size:
        raise CorruptImageError(
            path,
            f"too small for its disk of {size} bytes",
            field=f"l1_size of snapshot {found.id!r}",
            value=found.l1_entries,
        )
    return found


def describe(snapshot: Snapshot, header: Header) -> SnapshotInfo:
    """The entry as ``image info`` shows it."""
    return SnapshotInfo(
        id=snapshot.id,
        name=snapshot.name,
        vm_state_size=snapshot.vm_state_size,
        date_sec=snapshot.date_sec,
        date_nsec=snapshot.date_nsec,
        vm_clock_nsec=snapshot.vm_clock_nsec,
        disk_size=header.size if snapshot.disk_size is None else snapshot.disk_size,
        icount=snapshot.icount,
    )
