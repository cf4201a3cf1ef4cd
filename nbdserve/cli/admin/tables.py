"""Results of verbs as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_DEEPEST: Final = 2
_MOST_COLUMNS: Final = 8


def as_table(result: Any) -> RenderableType | str:
    """A list of objects has a row for each, one object a row for each member; anything else is text.

    Objects of many members are shown one below the other.
    """
    if isinstance(result, Sequence) and not isinstance(result, str) and all(isinstance(item, dict) for item in result):
        return _rows(result) if result else "none"
    if isinstance(result, Mapping):
        return _members(result) if result else ""
    return result.replace("\r\n", "\n").rstrip("\n") if isinstance(result, str) else json.dumps(result)


def _rows(items: Sequence[Mapping[str, Any]]) -> RenderableType:
    flat = [_flat(item) for item in items]
    columns = list(dict.fromkeys(name for item in flat for name in item))
    if len(columns) > _MOST_COLUMNS:
        return Group(*(_members(item) for item in items))
    table = Table(*columns, box=SIMPLE)
    for item in flat:
        table.add_row(*(Text(item.get(column, "")) for column in columns))
    return table


def _members(item: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE, show_header=False)
    for name, value in _flat(item).items():
        table.add_row(name, Text(value))
    return table


def _flat(item: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in item.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            flat |= _flat(value, f"{prefix}{name}.", depth + 1)
        else:
            flat[prefix + name] = _shown(value)
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)
