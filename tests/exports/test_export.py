"""Exports and the table that clients look them up in."""

from __future__ import annotations

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import ConfigError, OptionError
from nbdserve.exports.export import Export, ExportTable
from nbdserve.formats.raw import RawDriver
from nbdserve.protocol.constants import EXPORT_READ_ONLY, EXPORT_SEND_WRITE_ZEROES, MAX_STRING, REP_ERR_POLICY
from nbdserve.storage.memory import MemoryStorage


def _node(*, read_only: bool = False) -> Node:
    return Node([RawDriver(MemoryStorage(size=4096), 0, 4096, read_only=read_only)])


def test_an_export_of_a_read_only_node_is_read_only() -> None:
    assert not Export("a", _node()).read_only
    for export in (Export("a", _node(read_only=True)), Export("a", _node(), read_only=True)):
        assert export.read_only
        assert export.flags & EXPORT_READ_ONLY
        assert not export.flags & EXPORT_SEND_WRITE_ZEROES
    assert Export("a", _node()).size == 4096


def test_the_depth_context_is_offered_when_asked_for() -> None:
    assert Export("a", _node()).contexts == ("base:allocation",)
    assert Export("a", _node(), allocation_depth=True).contexts == ("base:allocation", "qemu:allocation-depth")


@pytest.mark.parametrize("text", ["x" * (MAX_STRING + 1), "é" * (MAX_STRING // 2 + 1), "a\0b"])
def test_a_name_or_description_no_client_can_take_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="its name must be at most 4096 bytes"):
        Export(text, _node())
    with pytest.raises(ConfigError, match="its description must be"):
        Export("a", _node(), description=text)
    Export("é" * (MAX_STRING // 2), _node())


def test_the_connection_limit_refuses_by_policy() -> None:
    export = Export("a", _node(), max_connections=2)
    export.connections = 1
    export.admit()
    export.connections = 2
    with pytest.raises(OptionError, match="2 clients") as caught:
        export.admit()
    assert caught.value.reply == REP_ERR_POLICY
    unlimited = Export("b", _node())
    unlimited.connections = 10_000
    unlimited.admit()


def test_the_first_export_answers_to_the_empty_name() -> None:
    table = ExportTable()
    assert table.find("") is None
    first, second = Export("a", _node()), Export("b", _node(), description="the other")
    table.add(first)
    table.add(second)
    assert table.find("") is table.find("a") is first
    assert table.find("b") is second
    assert table.find("c") is None
    assert table.list() == [("a", ""), ("b", "the other")]
    assert list(table) == [first, second]
    assert len(table) == 2


def test_an_export_with_the_empty_name_is_the_default_whatever_was_chosen() -> None:
    table = ExportTable()
    table.add(Export("a", _node()))
    empty = Export("", _node())
    table.add(empty)
    assert table.find("") is empty


def test_without_a_default_the_empty_name_finds_nothing() -> None:
    table = ExportTable()
    table.add(Export("a", _node()))
    table.default = None
    assert table.find("") is None


def test_a_name_is_given_once() -> None:
    table = ExportTable()
    table.add(Export("a", _node()))
    with pytest.raises(ConfigError, match="two exports have the name 'a'"):
        table.add(Export("a", _node()))


def test_removing_the_default_moves_it_on() -> None:
    table = ExportTable()
    first, second = Export("a", _node()), Export("b", _node())
    table.add(first)
    table.add(second)
    assert table.remove("a") is first
    assert table.find("") is second
    table.remove("b")
    assert table.find("") is None
    with pytest.raises(KeyError):
        table.remove("b")
