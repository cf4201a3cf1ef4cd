"""Pages of the file as they are to be: what one entry of the log changes together."""

from __future__ import annotations

from nbdserve.formats.tables import Piece
from nbdserve.formats.vhdx.log import PAGE
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import align_down


class ChangedPages:
    """Copies of pages, 4 KiB each, with bytes put into them."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pages: dict[int, bytearray] = {}

    async def put(self, offset: int, data: ReadBuffer) -> None:
        """``data`` is to be at the host offset ``offset``."""
        view = memoryview(data)
        while view:
            page = align_down(offset, PAGE)
            if page not in self._pages:
                self._pages[page] = await self._storage.read(page, PAGE)
            inside = offset - page
            part = view[: PAGE - inside]
            self._pages[page][inside : inside + len(part)] = part
            offset, view = offset + len(part), view[len(part) :]

    def pieces(self) -> list[Piece]:
        """The pages, ascending."""
        return sorted(self._pages.items())
