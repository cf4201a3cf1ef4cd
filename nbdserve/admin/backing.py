"""Nodes whose images are the backing files of another node: ``"backing": "NODE-NAME"``.

The node above opens those images once more, under the same locks, and the node itself stays as it is: read-only, and
not to be deleted while the other stands on it. A job that writes to them takes it into the chain (``take_in``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry, NodeTable
from nbdserve.block.graph import Origin
from nbdserve.block.reopening import open_again
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import RequestError
from nbdserve.formats.base import FormatDriver


def check_backing(found: NodeEntry, name: str) -> None:
    """QmpError when ``found``, meant by ``name``, may not be below other nodes."""
    if found.name != name or found.is_filter or found.inner is not None:
        raise QmpError(f"'{name}' cannot be a backing file here: give the node of a whole image")
    if not found.node.read_only:
        raise QmpError(f"Node '{name}' is open for writing: open it read-only, for it to be a backing file")


async def open_below(top: FormatDriver, found: NodeEntry) -> list[FormatDriver]:
    """The layers of ``found``, open once more, to be below ``top``, which accepts them.

    ImageError, OSError, QmpError: nothing stays open then.
    """
    if top.backing_formats == ():
        raise QmpError(f"{top.name} images have no backing file")
    layers: list[FormatDriver] = []
    try:
        for layer in found.layers:
            layers.append(await open_again(layer))
            above = layers[-2] if len(layers) > 1 else top
            above.accept_backing(layers[-1])
    except BaseException:
        await close_layers(layers)
        raise
    return layers


def know_backing(top: FormatDriver, below: FormatDriver) -> None:
    """``top`` has ``below`` under it, also when it is opened again."""
    assert isinstance(top.origin, Origin)
    spec = replace(top.origin.spec, backing=ImageSpec(below.path, below.name), gets_backing=False)
    top.origin = replace(top.origin, spec=spec)


async def close_layers(layers: Sequence[FormatDriver]) -> None:
    """Close layers that are read-only, and in no chain."""
    for layer in layers:
        with contextlib.suppress(OSError, RequestError):
            await layer.close()


async def take_in(nodes: NodeTable, entry: NodeEntry, index: int) -> None:
    """Before layer ``index`` of ``entry`` is written to: what it belongs to is no node of its own any more.

    Its names mean the layers of ``entry`` from then on. QmpError when somebody else uses it.
    """
    while (below := entry.standing_on()) is not None and index >= entry.foundation_index:
        others = [user for user in below.users if user != entry.label]
        if others:
            raise QmpError(f"Node '{below.name}' is in use by {others[0]}, and cannot be written")
        if below.permanent:
            raise QmpError(f"Node '{below.name}' was opened at the start for itself, and cannot be written")
        await nodes.absorb_below(entry, below)
