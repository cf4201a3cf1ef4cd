"""Tables in memory: their stored form, and what the cache may drop."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.formats.tables import (
    L2Cache,
    StoredForm,
    Table,
    decode_in_place,
    decode_table,
    decode_words,
    encode_words,
    read_tables,
    run_from,
    sector_runs,
)
from nbdserve.storage.memory import MemoryStorage


def test_words_are_big_endian_on_disk() -> None:
    words = decode_words(bytes(range(16)))
    assert words.tolist() == [0x0001020304050607, 0x08090A0B0C0D0E0F]
    assert encode_words(words) == bytes(range(16))


@given(st.sets(st.integers(0, 200)))
def test_sector_runs_cover_the_sectors_and_gaps_of_less_than_a_page(sectors: set[int]) -> None:
    runs = sector_runs(sectors)
    covered = {sector for first, end in runs for sector in range(first, end)}
    assert covered >= sectors
    assert all(first in sectors and end - 1 in sectors for first, end in runs)
    assert all(sectors & set(range(sector, sector + 8)) for sector in covered)
    assert all(one[1] < two[0] for one, two in itertools.pairwise(runs))


def test_only_changed_sectors_are_written() -> None:
    table = Table(4096, np.zeros(512, np.uint64))
    table.store(3, 1 << 63)
    table.store(64, 5)
    table.store(400, 7)
    pieces = table.pieces(table.dirty)
    assert [(offset, len(data)) for offset, data in pieces] == [(4096, 3584)]
    assert pieces[0][1][24:32] == (1 << 63).to_bytes(8, "big")


def test_a_table_of_less_than_a_sector_ends_where_it_ends() -> None:
    table = Table(512, np.zeros(3, np.uint64))
    table.store(2, 1)
    assert table.pieces(table.dirty) == [(512, bytes(23) + b"\1")]


@pytest.mark.parametrize(
    ("stored", "size", "byteorder"),
    [(">u8", 8, "big"), ("<u8", 8, "little"), (">u4", 4, "big"), ("<u4", 4, "little")],
)
def test_words_of_every_stored_form(stored: StoredForm, size: int, byteorder: Literal["big", "little"]) -> None:
    data = bytes(range(200, 200 + 4 * size))
    table = Table(1 << 20, decode_table(data, stored), stored)
    assert list(table.entries) == [int.from_bytes(data[at : at + size], byteorder) for at in range(0, 4 * size, size)]
    assert table.encode() == data
    assert decode_in_place(bytearray(data), stored).tolist() == list(table.entries)
    table.store(1, 0x01020304)
    assert table.pieces(table.dirty) == [
        (1 << 20, data[:size] + (0x01020304).to_bytes(size, byteorder) + data[2 * size :])
    ]


def test_sectors_of_32_bit_words_have_128_of_them() -> None:
    table = Table(0, np.zeros(4096, np.uint32), "<u4")
    table.store(127, 1)
    assert table.dirty == {0}
    table.touch(128, 257)
    assert table.dirty == {0, 1, 2}


def test_a_stored_word_counts_as_a_change_of_the_cache() -> None:
    cache = L2Cache(4096, stored="<u4")
    table = cache.create(5, 8192, np.zeros(1024, np.uint32))
    assert not cache.changed
    table.store(200, 7)
    assert cache.changed == {table}
    assert [(offset, len(data)) for offset, data in table.pieces(table.dirty)] == [(8192 + 512, 512)]


def test_the_cache_is_bounded_and_keeps_what_differs_from_the_disk() -> None:
    cache = L2Cache(4096, limit=64 * 1024)
    cache.create(0, 4096, np.zeros(512, np.uint64)).touch(0, 1)
    cache.create(1, 4096, np.zeros(512, np.uint64)).pins = 1
    for index in range(2, 500):
        cache.create(index, 4096, np.zeros(512, np.uint64))
    present = [index for index in range(500) if cache.peek(index) is not None]
    assert present[:2] == [0, 1]
    assert len(present) <= 20
    assert 499 in present
    table = cache.find(0)
    assert table is not None and table in cache.changed


def test_what_is_used_stays() -> None:
    cache = L2Cache(4096, limit=64 * 1024)
    cache.create(0, 4096, np.zeros(512, np.uint64))
    for index in range(1, 100):
        cache.create(index, 4096, np.zeros(512, np.uint64))
        assert cache.find(0) is not None


@given(
    words=st.lists(st.sampled_from([0, 1, 65536, 131072, 196608, 262144]), min_size=1, max_size=8),
    index=st.integers(0, 7),
    inside=st.integers(0, 65535),
    length=st.integers(1, 1 << 20),
    step=st.sampled_from([0, 65536]),
)
def test_a_run_is_as_long_as_the_entries_keep_step(
    words: list[int], index: int, inside: int, length: int, step: int
) -> None:
    index = min(index, len(words) - 1)
    count = 1
    while index + count < len(words) and words[index + count] == words[index] + count * step:
        count += 1
    entries = Table(0, np.array(words, np.uint64)).entries
    found = run_from(entries, index, len(words), 65536 - inside, length, 65536, step)
    assert found == min(length, count * 65536 - inside)


async def test_tables_side_by_side_are_read_together_and_those_in_memory_are_not() -> None:
    class Counting(MemoryStorage):
        def try_read_into(self, offset: int, buffer: memoryview) -> bool:
            reads.append((offset, len(buffer)))
            return offset != 4096 and super().try_read_into(offset, buffer)

        async def read_into(self, offset: int, buffer: memoryview) -> None:
            assert super().try_read_into(offset, buffer)
            if offset == 4096:  # changed by somebody else meanwhile
                cache.create(14, 4096, np.full(64, 77, np.uint64))

    reads: list[tuple[int, int]] = []
    storage, cache = Counting(), L2Cache(512)
    places = {10: 0, 11: 512, 13: 2048, 14: 4096, 15: 4608}
    for number, offset in places.items():
        await storage.write(offset, encode_words(np.full(64, number, np.uint64)))
    cache.create(12, 1024, np.full(64, 99, np.uint64))
    words = await read_tables(storage, cache, range(10, 16), 512, places.__getitem__, decode_words)
    assert [set(row) for row in words.reshape(6, -1).tolist()] == [{10}, {11}, {99}, {13}, {77}, {15}]
    assert reads == [(0, 1024), (2048, 512), (4096, 1024)]
