"""The lower layers of a node as a disk of their own, for a job that works on them while clients use the whole."""

from __future__ import annotations

from nbdserve.block.drain import drained
from nbdserve.block.node import Node
from nbdserve.formats.base import Allocation


class LowerNode(Node):
    """The disk that the layers of ``upper`` from ``index`` down make.

    What it writes, clients of ``upper`` must not see, or must see as no change: a commit writes where layers above
    decide. It shares the range locks of ``upper``, so that nobody reads a cluster there while it is moved here. Space
    is never given back, for a reply that was sent from the file may still refer to it. Not to be closed: the layers
    are those of ``upper``.
    """

    def __init__(self, upper: Node, index: int) -> None:
        self._upper = upper
        super().__init__(upper.layers[index:], locks=upper.locks)

    async def make_room(self) -> None:
        """As of a node; no request of ``upper`` is under way, either, and it forgets all places."""
        async with drained(self._upper, self):
            try:
                await super().make_room()
            finally:
                self._upper.replace_layers(self._upper.layers)

    def publish(self, allocation: Allocation) -> None:
        """As of a node; ``upper`` forgets the places, too."""
        try:
            super().publish(allocation)
        finally:
            self._upper.places.forget(allocation.offset, allocation.length)

    def zero_mapping(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """As of a node, without giving space back."""
        try:
            return super().zero_mapping(offset, length, unmap=False)
        finally:
            self._upper.places.forget(offset, length)
