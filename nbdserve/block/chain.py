"""What a chain of layers has at a guest range: the first layer that decides. Pure and synchronous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from nbdserve.extents import UNALLOCATED, ZERO
from nbdserve.formats.base import FormatDriver

NEEDS_TABLE: Final = -1
"""The kind of a resolution that stopped because ``layers[index].load(offset)`` must be awaited first."""

Resolved: TypeAlias = tuple[int, int, int, int]
"""``(kind, length, layer index, host_offset)``; DATA, ZERO, COMPRESSED or NEEDS_TABLE."""


def resolve(layers: Sequence[FormatDriver], offset: int, length: int) -> Resolved:
    """The start of ``[offset, offset + length)`` as the chain has it.

    A layer shorter than the ones above it reads as zeroes past its end; what no layer decides is zeroes. The layer
    index of such a zero is that of the layer that ended the search.
    """
    index = 0
    for index, layer in enumerate(layers):
        room = layer.size - offset
        if room <= 0:
            return ZERO, length, index, -1
        if length > room:
            length = room
        run = layer.lookup(offset, length)
        if run is None:
            return NEEDS_TABLE, length, index, -1
        kind, length, host_offset = run
        if kind != UNALLOCATED:
            return kind, length, index, host_offset
    return ZERO, length, index, -1
