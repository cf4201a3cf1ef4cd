"""``image check`` for raw-cow."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.raw_cow.bitmap import Bitmap
from nbdserve.formats.raw_cow.header import HeaderSector
from nbdserve.formats.raw_cow.layout import Header, stored_time
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, div_ceil


@dataclass(frozen=True, slots=True)
class BackingSeen:
    """What is known of the backing file."""

    changed_at: float | None = None
    """Seconds since 1970."""
    problem: str = ""
    """Why it cannot be opened."""


async def check_raw_cow(
    storage: Storage,
    raw: Storage | None,
    header: Header,
    sector: HeaderSector,
    bitmap: Bitmap,
    backing: BackingSeen,
    *,
    repair_leaks: bool = False,
    repair_errors: bool = False,
) -> CheckResult:
    """Compare bitmap and files of an idle image; ``raw`` is None where the raw file is not open.

    Leaks are bits that stand for nothing and sectors behind the bitmap: a crash while the disk was resized leaves them.
    Errors are a wrong checksum of the header, which the repair makes right, taking the header's word for the rest; and
    clusters that the raw file should have and does not, because the file was cut off: the repair makes the file as long
    as the disk, which is what the guest sees of it already. ImageError when a repair is asked for on read-only files.

    The backing file matters as long as some cluster is its: one that cannot be opened is an error of the check itself,
    one that was changed since the image was made is told, and no more, for a copy of the same bytes is younger too.
    """
    if (repair_leaks or repair_errors) and storage.read_only:
        raise ImageError(storage.path, "open read-only, so it cannot be repaired")
    result = CheckResult(
        image_end_offset=header.end_offset,
        total_clusters=bitmap.clusters,
        allocated_clusters=bitmap.clusters - bitmap.missing,
    )
    if not sector.is_sealed:
        result.messages.append("the header's checksum is wrong")
        if repair_errors:
            await sector.patch()
            result.corruptions_fixed += 1
        else:
            result.corruptions += 1
    await _check_bits(storage, bitmap, result, repair=repair_leaks)
    await _check_end(storage, header, result, repair=repair_leaks)
    if raw is not None:
        await _check_raw_file(raw, header, bitmap, result, repair=repair_errors)
    if bitmap.missing:
        _check_backing(backing, header, result)
    return result


def _check_backing(backing: BackingSeen, header: Header, result: CheckResult) -> None:
    if backing.problem:
        result.check_errors += 1
        result.messages.append(f"ERROR {backing.problem}")
    elif backing.changed_at is not None and header.mtime not in (0, stored_time(backing.changed_at)):
        then, now = (
            datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            for seconds in (header.mtime, backing.changed_at)
        )
        result.messages.append(
            f"WARNING the backing file {header.backing_file!r} was changed at {now}, and when this image was made it "
            f"was of {then}: what is not in the raw file may have changed too"
        )


async def _check_bits(storage: Storage, bitmap: Bitmap, result: CheckResult, *, repair: bool) -> None:
    stray = bitmap.stray()
    if not stray:
        return
    result.messages.append(f"{stray} bits are set behind the last cluster")
    if repair:
        bitmap.clear(bitmap.clusters, len(bitmap.bits) << 3)
        await storage.write_stable(bitmap.pieces(bitmap.dirty))
        bitmap.dirty.clear()
        result.leaks_fixed += stray
    else:
        result.leaks += stray


async def _check_end(storage: Storage, header: Header, result: CheckResult, *, repair: bool) -> None:
    extra = div_ceil(storage.size - header.end_offset, SECTOR_SIZE)
    if extra <= 0:
        return
    result.messages.append(f"{extra} sectors follow the bitmap")
    if repair:
        await storage.truncate(header.end_offset)
        await storage.flush()
        result.leaks_fixed += extra
    else:
        result.leaks += extra


async def _check_raw_file(raw: Storage, header: Header, bitmap: Bitmap, result: CheckResult, *, repair: bool) -> None:
    if raw.size > header.size:
        extra = raw.size - header.size
        result.messages.append(f"the raw file has {extra} bytes behind the end of the disk: they are no part of it")
    if raw.size >= header.size:
        return
    first = raw.size // header.cluster_size
    cut = int(np.count_nonzero(bitmap.array(first, bitmap.clusters)))
    if not cut:
        return
    result.messages.append(
        f"the raw file has only {raw.size} bytes: {cut} clusters that should be in it are cut off, and read as zeroes"
    )
    if repair and not raw.read_only:
        await raw.truncate(header.size)
        await raw.flush()
        result.corruptions_fixed += cut
    else:
        result.corruptions += cut
