"""The parts of a read."""

from __future__ import annotations

from nbdserve.block.pieces import add_piece, zero_pieces


def test_pieces_are_merged_and_zeroed() -> None:
    pieces: list[tuple[bool, int]] = []
    for is_zero, length in ((False, 1), (False, 2), (True, 3), (True, 1), (False, 1)):
        add_piece(pieces, is_zero, length)
    assert pieces == [(False, 3), (True, 4), (False, 1)]
    buffer = memoryview(bytearray(b"\xee" * 8))
    zero_pieces(buffer, pieces)
    assert bytes(buffer) == b"\xee" * 3 + bytes(4) + b"\xee"
