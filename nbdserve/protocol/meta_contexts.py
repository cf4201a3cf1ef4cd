"""Which metadata contexts the queries of a client mean (spec, "Metadata querying")."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count
from typing import Final

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""Before the name of a bitmap; the status is 1 where it is dirty, 0 elsewhere."""

_FIXED_IDS: Final = {BASE_ALLOCATION: 0, ALLOCATION_DEPTH: 1}
_LIST_WILDCARDS: Final = ("base:", "qemu:", DIRTY_BITMAP)
"""Queries that stand for all contexts they begin, in LIST_META_CONTEXT only."""

Context = tuple[int, str]
"""Id and name. The ids are QEMU's: 0 and 1 for the first two, 2 + i for the bitmap number i."""


def list_contexts(available: Sequence[str], queries: Collection[str]) -> list[Context]:
    """What LIST_META_CONTEXT answers: everything without a query, else what the queries name or begin.

    Each context is answered once, in the export's order; what is not available is passed over, as is a query that has
    no namespace. The id of a listed context means nothing and is 0.
    """
    prefixes = tuple(query for query in queries if query in _LIST_WILDCARDS)
    return [(0, name) for name in available if not queries or name in queries or name.startswith(prefixes)]


def select_contexts(available: Sequence[str], queries: Collection[str]) -> list[Context]:
    """What SET_META_CONTEXT selects: exactly the names asked for; a wildcard or an unknown name selects nothing."""
    others = count(2)
    numbered = [(_FIXED_IDS[name] if name in _FIXED_IDS else next(others), name) for name in available]
    return [context for context in numbered if context[1] in queries]
