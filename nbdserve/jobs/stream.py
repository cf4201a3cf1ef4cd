"""Stream: the top layer of a node is given what the layers below it hold, and does without them from then on."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from nbdserve.block.node import Node
from nbdserve.block.populate import populate
from nbdserve.block.window import map_node
from nbdserve.errors import JobError, RequestError
from nbdserve.extents import UNALLOCATED
from nbdserve.formats.base import BackingReference
from nbdserve.jobs.commit import put_on, reference_to
from nbdserve.jobs.in_flight import InFlight
from nbdserve.jobs.mirror import NodeJob
from nbdserve.units import GIB, MIB

_SEGMENT: Final = GIB
_STEP: Final = MIB
_REQUESTS: Final = 8


class Stream(NodeJob):
    """Copies into the top layer what the layers above number ``base_index`` hold, while clients read and write.

    At the end the top layer names the base as its backing file, or none, and the layers between are closed, as they
    were. Ended before, it has copied some of it, which nobody notices.
    """

    type: ClassVar[str] = "stream"

    def __init__(
        self,
        id: str,
        node: Node,
        base_index: int | None = None,
        *,
        backing: BackingReference | None = None,
        on_error: str = "report",
        **options: Any,
    ) -> None:
        """``base_index`` None: all layers. ``backing``: how the top layer is to name the base, if not as found.

        ``options`` are those of ``Job``.
        """
        count = len(node.layers)
        self._base_index = count if base_index is None else base_index
        if not 0 < self._base_index <= count:
            raise JobError(f"the chain has no layer number {base_index}")
        if node.read_only:
            raise JobError(f"Block node is read-only: {node.path}")
        if not node.top.can("set_backing") and count > 1:
            raise JobError(f"{node.format} images cannot be given another backing file")
        super().__init__(id, node, **options)
        self._reference = backing
        self._on_error = on_error
        self._in_flight = InFlight(_REQUESTS)
        self._again: list[tuple[int, int]] = []
        """Where an error has stopped the job, to be tried again when it goes on."""
        self._skipped: Exception | None = None
        """An error that was ignored: the layers have to stay."""

    async def run(self) -> None:
        """Copy, a stretch of the map at a time."""
        if self._base_index == 1:
            return
        self.total_progress = self.node.size
        try:
            for start in range(0, self.node.size, _SEGMENT):
                await self._segment(start, min(start + _SEGMENT, self.node.size))
            await self._in_flight.drain()
            while self._again:
                await self._range(*self._again.pop())
                await self._in_flight.drain()
            if self._skipped is not None:
                raise self._skipped
        finally:
            await self._in_flight.cancel()

    async def _segment(self, start: int, end: int) -> None:
        async with self.node.gate:
            parts = [part async for part in map_node(self.node, start, end)]
        for part in parts:
            between = (part.depth > 0) & (part.depth < self._base_index)
            if self._base_index < len(self.node.layers):
                # Below the layer of this depth is one that ends earlier: nothing of the base shows there.
                between |= (part.kind == UNALLOCATED) & (part.depth + 1 < self._base_index)
            for at, length, wanted in zip(part.start.tolist(), part.length.tolist(), between.tolist(), strict=True):
                if wanted:
                    await self._range(at, at + length)
                else:
                    self.current_progress += length

    async def _range(self, start: int, end: int) -> None:
        while start < end:
            stop = min(end, start - start % _STEP + _STEP)
            if self.pause_requested:
                await self._in_flight.drain()
            await self.throttle(stop - start)
            await self._in_flight.room()
            self._in_flight.begin(self._copy(start, stop))
            start = stop

    async def _copy(self, start: int, end: int) -> None:
        self.current_progress += end - start
        while start < end:
            try:
                start += await populate(self.node, start, end - start, self._base_index)
            except (OSError, RequestError) as error:
                if not self.failed_io("read", error, self._on_error):
                    raise
                if self.pause_requested:
                    self._again.append((start, end))
                else:
                    self._skipped = error
                return

    async def prepare(self) -> None:
        """Let the top layer name what is below it from now on."""
        if self._base_index == 1:
            return
        await self.drain()
        node, base = self.node, self._base_index
        layers = node.layers
        await node.flush()
        if base == len(layers):
            reference = None
        else:
            reference = self._reference or reference_to(layers[0], layers[base - 1], layers[base])
        self._dropped = await put_on(node, 0, base, reference)
