"""The parts of a read: which of them are zeroes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from nbdserve.buffers import fill_zeroes

if TYPE_CHECKING:
    from nbdserve.block.node import Node

Piece: TypeAlias = tuple[bool, int]
"""``(is zero, length)``: a part of a read; of a zero part the buffer is not touched."""


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


async def write_pieces(node: Node, offset: int, data: memoryview, pieces: list[Piece]) -> None:
    """Let ``node`` have at ``offset`` what was read into ``data``. OSError, RequestError."""
    position = 0
    for is_zero, length in pieces:
        if is_zero:
            await node.zero(offset + position, length)
        else:
            await node.write(offset + position, data[position : position + length])
        position += length
