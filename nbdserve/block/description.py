"""What an image is, as QEMU's ``ImageInfo``: for ``image info`` and for the admin socket."""

from __future__ import annotations

from typing import Any, Final

from nbdserve.formats.base import ImageInfo, SnapshotInfo

_NSEC: Final = 1_000_000_000


def full_name(image: str, named: str) -> str:
    """The file a header calls ``named``: relative names begin at the directory of ``image``."""
    return named if named.startswith("/") else image[: image.rfind("/") + 1] + named


def image_info(path: str, facts: ImageInfo, disk_size: int | None) -> dict[str, Any]:
    """The object qemu-img prints; ``disk_size``: bytes of disk space the image's files use, where that is known."""
    result: dict[str, Any] = {
        "virtual-size": facts.virtual_size,
        "filename": path,
        "format": facts.format,
    }
    if disk_size is not None:
        result["actual-size"] = disk_size
    if facts.dirty is not None:
        result["dirty-flag"] = facts.dirty
    if facts.cluster_size is not None:
        result["cluster-size"] = facts.cluster_size
    if facts.encrypted:
        result["encrypted"] = True
    if facts.specific:
        result["format-specific"] = {"type": facts.format, "data": facts.specific}
    if facts.backing is not None:
        result["backing-filename"] = facts.backing.name
        result["full-backing-filename"] = full_name(path, facts.backing.name)
        if facts.backing.format is not None:
            result["backing-filename-format"] = facts.backing.format
    if facts.snapshots:
        result["snapshots"] = [_snapshot(snapshot) for snapshot in facts.snapshots]
    return result


def _snapshot(snapshot: SnapshotInfo) -> dict[str, Any]:
    result: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // _NSEC,
        "vm-clock-nsec": snapshot.vm_clock_nsec % _NSEC,
    }
    return result if snapshot.icount is None else result | {"icount": snapshot.icount}
