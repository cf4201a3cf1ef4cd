"""The first layer that decides, against a model that goes byte by byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.extents import COMPRESSED, DATA, ZERO
from tests.block.layers import CLUSTER, Scripted, guest

chains = st.lists(st.text("DZ.C", min_size=1, max_size=8), min_size=1, max_size=4).map(
    lambda layers: [Scripted(clusters, letter) for clusters, letter in zip(layers, "abcd", strict=False)]
)


@given(chains, st.data())
def test_every_byte_comes_from_the_first_layer_that_decides(layers: list[Scripted], data: st.DataObject) -> None:
    size = layers[0].size
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    content, offset = bytearray(), start
    while offset < end:
        kind, length, index, host_offset = resolve(layers, offset, end - offset)
        assert 1 <= length <= end - offset
        if kind == DATA:
            buffer = memoryview(bytearray(length))
            layers[index].data.try_read_into(host_offset, buffer)
            content += buffer
        elif kind == COMPRESSED:
            content += layers[index].letter.upper() * length
        else:
            assert kind == ZERO
            content += bytes(length)
        offset += length
    assert content == guest(layers)[start:end]


def test_a_short_backing_layer_is_zero_past_its_end() -> None:
    layers = [Scripted("...", "a"), Scripted("D", "b", size=3)]
    assert resolve(layers, 0, 12) == (DATA, 3, 1, 0)
    assert resolve(layers, 3, 9)[:3] == (ZERO, 1, 1)
    assert resolve(layers, 4, 8)[0] == ZERO


def test_a_long_backing_layer_shows_no_more_than_the_top() -> None:
    layers = [Scripted(".", "a", size=3), Scripted("DDD", "b")]
    assert resolve(layers, 0, 3) == (DATA, 3, 1, 0)


def test_a_table_that_is_not_in_memory_is_asked_for_by_its_layer() -> None:
    layers = [Scripted("....", "a"), Scripted("DDDD", "b", loaded=False)]
    assert resolve(layers, 2 * CLUSTER, 4) == (NEEDS_TABLE, 4, 1, -1)
    layers[1].tables.add(1)
    assert resolve(layers, 2 * CLUSTER, 4) == (DATA, 4, 1, 8)


def test_a_zero_cluster_hides_what_is_below() -> None:
    assert resolve([Scripted("Z", "a"), Scripted("D", "b")], 0, 4)[:3] == (ZERO, 4, 0)
