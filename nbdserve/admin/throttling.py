"""Throttle groups as commands see them: QEMU's ``ThrottleLimits``."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from nbdserve.admin.errors import QmpError
from nbdserve.admin.schema import Arguments, Int
from nbdserve.block.filters.throttle import Limit, Limits

_MOST_SECONDS: Final = (1 << 32) - 1


class ThrottleLimits(Arguments):
    """What a throttle group allows, of bytes and operations a second; 0: any. ``max`` is a burst, of ``length`` s."""

    iops_total: Int | None = None
    iops_total_max: Int | None = None
    iops_total_max_length: Int | None = None
    iops_read: Int | None = None
    iops_read_max: Int | None = None
    iops_read_max_length: Int | None = None
    iops_write: Int | None = None
    iops_write_max: Int | None = None
    iops_write_max_length: Int | None = None
    bps_total: Int | None = None
    bps_total_max: Int | None = None
    bps_total_max_length: Int | None = None
    bps_read: Int | None = None
    bps_read_max: Int | None = None
    bps_read_max_length: Int | None = None
    bps_write: Int | None = None
    bps_write_max: Int | None = None
    bps_write_max_length: Int | None = None
    iops_size: Int | None = None


class LimitsProperty(Arguments):
    """The property of a group that can be set."""

    limits: ThrottleLimits


_KINDS: Final = ("iops_total", "iops_read", "iops_write", "bps_total", "bps_read", "bps_write")


def merged(limits: Limits, given: ThrottleLimits) -> Limits:
    """``limits`` with those that are given instead. QmpError for a length that is none."""
    changed: dict[str, Limit] = {}
    for kind in _KINDS:
        before: Limit = getattr(limits, kind)
        rate, burst, seconds = (getattr(given, f"{kind}{suffix}") for suffix in ("", "_max", "_max_length"))
        if seconds is not None and seconds > _MOST_SECONDS:
            name = f"{kind}_max_length".replace("_", "-")
            raise QmpError(f"{name} value must be in the range [0, {_MOST_SECONDS}]")
        changed[kind] = Limit(
            before.rate if rate is None else rate,
            before.burst if burst is None else burst,
            before.burst_seconds if seconds is None else seconds,
        )
    size = limits.iops_size if given.iops_size is None else given.iops_size
    return replace(limits, iops_size=size, **changed)


def shown(limits: Limits) -> dict[str, int]:
    """All of them, by the names of ``ThrottleLimits``."""
    members: dict[str, int] = {}
    for kind in _KINDS:
        limit: Limit = getattr(limits, kind)
        name = kind.replace("_", "-")
        members |= {name: limit.rate, f"{name}-max": limit.burst, f"{name}-max-length": limit.burst_seconds}
    return members | {"iops-size": limits.iops_size}
