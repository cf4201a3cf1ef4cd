"""Refcounts of every width."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import RequestError
from nbdserve.formats.qcow2.image import read_header
from nbdserve.formats.qcow2.refcounts import Refcounts, decode_counts, encode_counts
from nbdserve.storage.file import FileStorage
from tests.formats.qcow2.engine import create, open_image, write


@given(order=st.integers(0, 6), data=st.binary(min_size=64, max_size=64))
def test_stored_form_is_a_bijection(order: int, data: bytes) -> None:
    counts = decode_counts(data, order)
    assert len(counts) == 64 * 8 >> order
    assert encode_counts(counts, order) == data


def test_narrow_counts_begin_at_the_least_significant_bit() -> None:
    assert decode_counts(b"\x01", 0).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert decode_counts(b"\x09", 1).tolist() == [1, 2, 0, 0]
    assert decode_counts(b"\x2f", 2).tolist() == [15, 2]
    assert decode_counts(b"\x01\x02", 4).tolist() == [0x102]


@pytest.mark.parametrize("order", range(7))
async def test_counts_of_an_image(tmp_path: Path, order: int) -> None:
    path = create(tmp_path / "a.qcow2", "8M", f"refcount_bits={1 << order}")
    driver = await open_image(path)
    await write(driver, 0, b"x")
    await driver.close()
    storage = await FileStorage.open(str(path), read_only=True)
    header, _ = await read_header(storage)
    refcounts = await Refcounts.open(storage, header)
    used = -(-storage.size // header.cluster_size)
    assert [await refcounts.count(cluster) for cluster in range(used + 4)] == [1] * used + [0] * 4
    await storage.close()


async def test_a_bad_table_entry_fails_when_it_is_needed(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "8M")
    driver = await open_image(path)
    driver.refcounts.table.store(0, 1 << 40)
    with pytest.raises(RequestError) as caught:
        await driver.prepare(0, 65536)
    assert caught.value.errno == errno.EIO
    assert not np.any(driver.refcounts.table.words[1:])
    driver.refcounts.table.dirty.clear()
    await driver.close()
