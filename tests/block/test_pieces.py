"""The parts of a read."""

from __future__ import annotations

from nbdserve.block.pieces import add_piece, write_pieces, zero_pieces
from nbdserve.storage.memory import MemoryStorage
from tests.block.layers import raw_node


def test_pieces_are_merged_and_zeroed() -> None:
    pieces: list[tuple[bool, int]] = []
    for is_zero, length in ((False, 1), (False, 2), (True, 3), (True, 1), (False, 1)):
        add_piece(pieces, is_zero, length)
    assert pieces == [(False, 3), (True, 4), (False, 1)]
    buffer = memoryview(bytearray(b"\xee" * 8))
    zero_pieces(buffer, pieces)
    assert bytes(buffer) == b"\xee" * 3 + bytes(4) + b"\xee"


async def test_pieces_are_written() -> None:
    node = await raw_node(MemoryStorage(b"." * 8))
    await write_pieces(node, 1, memoryview(b"ab??c"), [(False, 2), (True, 2), (False, 1)])
    assert await node.read(0, 8) == b".ab\0\0c.."
