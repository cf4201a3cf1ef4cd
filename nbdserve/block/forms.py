"""The answers of requests that do not wait, and the forms they have while a node is held back or has shrunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdserve.block.pieces import Piece
from nbdserve.block.writer import WRITE_WAIT, Done
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from nbdserve.block.node import Node

READ_WAIT: Final = 0
"""Nothing is known without waiting: use ``read_pieces``."""
READ_DATA: Final = 1
"""The buffer is filled."""
READ_ZERO: Final = 2
"""The whole range reads as zeroes; the buffer is not touched."""
READ_SPLIT: Final = 3
"""The range is made of several runs: use ``try_read_pieces``."""


def refuse_read(offset: int, buffer: memoryview) -> int:
    """``Node.try_read_into`` that leaves everything to ``read_pieces``."""
    return READ_WAIT


def refuse_pieces(offset: int, buffer: memoryview) -> list[Piece] | None:
    """``Node.try_read_pieces`` of the same kind."""
    return None


def refuse_place(offset: int, length: int) -> tuple[Storage, int] | None:
    """``Node.locate_read`` of the same kind."""
    return None


def refuse_write(offset: int, data: memoryview, done: Done) -> int:
    """``Node.submit_write`` that leaves everything to ``write``."""
    return WRITE_WAIT


def refuse_all(node: Node) -> None:
    """Nothing is done without waiting: the node is held back."""
    node.try_read_into = refuse_read  # type: ignore[method-assign]
    node.try_read_pieces = refuse_pieces  # type: ignore[method-assign]
    node.locate_read = refuse_place  # type: ignore[method-assign]
    node.submit_write = refuse_write  # type: ignore[method-assign]


def refuse_outside(node: Node) -> None:
    """The disk has shrunk: what lies outside of it is left to the forms that wait, which refuse it."""
    read, submit, size = node.try_read_into, node.submit_write, node.size
    read_pieces, locate = node.try_read_pieces, node.locate_read

    def try_read_into(offset: int, buffer: memoryview) -> int:
        return READ_WAIT if offset + len(buffer) > size else read(offset, buffer)

    def try_read_pieces(offset: int, buffer: memoryview) -> list[Piece] | None:
        return None if offset + len(buffer) > size else read_pieces(offset, buffer)

    def locate_read(offset: int, length: int) -> tuple[Storage, int] | None:
        return None if offset + length > size else locate(offset, length)

    def submit_write(offset: int, data: memoryview, done: Done) -> int:
        return WRITE_WAIT if offset + len(data) > size else submit(offset, data, done)

    node.try_read_into = try_read_into  # type: ignore[method-assign]
    node.try_read_pieces = try_read_pieces  # type: ignore[method-assign]
    node.locate_read = locate_read  # type: ignore[method-assign]
    node.submit_write = submit_write  # type: ignore[method-assign]
