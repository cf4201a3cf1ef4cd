"""Entries of tables."""

from __future__ import annotations

import pytest

from nbdserve.errors import CorruptImageError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.layout import compressed_range


def test_compressed_range() -> None:
    assert compressed_range(layout.COMPRESSED_FLAG | 0x12345 | 3 << 54, 16) == (0x12345, 4 * 512 - 0x145)


def test_a_table_is_aligned_and_inside_the_file() -> None:
    inside = {"cluster_size": 512, "file_size": 2048}
    layout.table_inside("a", "table", 1024, 1024, **inside)
    layout.table_inside("a", "table", 0, 0, **inside)
    for offset, length in ((1025, 1), (1024, 1025), (0, 512)):
        with pytest.raises(CorruptImageError, match="table"):
            layout.table_inside("a", "table", offset, length, **inside)
