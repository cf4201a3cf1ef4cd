"""The parts of a read: which of them are zeroes."""

from __future__ import annotations

from typing import Final, TypeAlias

from nbdserve.units import MIB

Piece: TypeAlias = tuple[bool, int]
"""``(is zero, length)``: a part of a read; of a zero part the buffer is not touched."""

_ZEROES: Final = bytes(1 * MIB)


def fill_zeroes(buffer: memoryview) -> None:
    """Zero ``buffer``."""
    length = len(buffer)
    for start in range(0, length, MIB):
        part = min(MIB, length - start)
        buffer[start : start + part] = _ZEROES[:part] if part < MIB else _ZEROES


def add_piece(pieces: list[Piece], is_zero: bool, length: int) -> None:
    """Append a part, merged with the last one if that is of the same sort."""
    if pieces and pieces[-1][0] == is_zero:
        pieces[-1] = (is_zero, pieces[-1][1] + length)
    else:
        pieces.append((is_zero, length))


def zero_pieces(buffer: memoryview, pieces: list[Piece]) -> None:
    """Zero those parts of ``buffer`` that are zero pieces."""
    position = 0
    for is_zero, length in pieces:
        if is_zero:
            fill_zeroes(buffer[position : position + length])
        position += length
