"""Finding what is zero in data that was read, at the speed of memory."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.block.cow import is_zero

Flags: TypeAlias = npt.NDArray[np.bool_]

DataRun: TypeAlias = tuple[bool, int, int]
"""``(is zero, start, end)`` in the buffer."""


def zero_units(data: memoryview, unit: int) -> Flags:
    """For each whole ``unit`` of ``data`` (a multiple of 8 bytes) whether it is zero.

    Three words of each are looked at first: data that is not zero is nearly always told by them (0.1 ms for 2 MiB).
    """
    count = len(data) // unit
    words = np.frombuffer(data, np.uint64, count * (unit >> 3)).reshape(count, unit >> 3)
    zero: Flags = (words[:, 0] | words[:, words.shape[1] >> 1] | words[:, -1]) == 0
    suspects = np.flatnonzero(zero)
    if len(suspects):
        looked_at = words if len(suspects) == count else words[suspects]
        zero[suspects] = np.bitwise_or.reduce(looked_at, axis=1) == 0
    return zero


def data_runs(data: memoryview, offset: int, unit: int, shortest: int) -> list[DataRun]:
    """``data``, which belongs at guest ``offset``, cut into runs of zeroes and of the rest.

    Zeroes are looked for in ``unit`` bytes at multiples of it in the guest's disk, and at the ends in what is left
    over there; a run of them shorter than ``shortest`` bytes between others counts as data.
    """
    length = len(data)
    lead = min(-offset % unit, length)
    body = (length - lead) // unit * unit
    bounds = np.arange(lead, lead + body + 1, unit)
    flags = zero_units(data[lead : lead + body], unit) if body else np.empty(0, np.bool_)
    if lead:
        bounds, flags = np.append(0, bounds), np.append(is_zero(data[:lead]), flags)
    if lead + body < length:
        bounds, flags = np.append(bounds, length), np.append(flags, is_zero(data[lead + body :]))
    if not flags.any():
        return [(False, 0, length)]
    first = np.flatnonzero(np.concatenate(([True], flags[1:] != flags[:-1])))
    runs: list[DataRun] = []
    for zero, start, end in zip(
        flags[first].tolist(), bounds[first].tolist(), bounds[np.append(first[1:], len(flags))].tolist(), strict=True
    ):
        short = end - start < shortest and start > 0 and end < length
        is_hole = zero and not short
        if runs and runs[-1][0] == is_hole:
            runs[-1] = (is_hole, runs[-1][1], end)
        else:
            runs.append((is_hole, start, end))
    return runs
