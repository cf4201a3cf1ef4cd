"""Exports: a name, a node, and the policy under which clients see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.node import Node
from nbdserve.errors import ConfigError, OptionError
from nbdserve.exports.flags import transmission_flags
from nbdserve.protocol.constants import ADVERTISED_MAX_PAYLOAD, MAX_STRING, REP_ERR_POLICY
from nbdserve.protocol.meta_contexts import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP


class Export:
    """A node under a name. ``max_connections`` 0: any number."""

    minimum_block = 1
    """Bytes. Unaligned requests are served everywhere, so nothing coarser is asked of clients."""
    preferred_block = 4096
    maximum_block = ADVERTISED_MAX_PAYLOAD

    def __init__(
        self,
        name: str,
        node: Node,
        *,
        description: str = "",
        read_only: bool = False,
        allocation_depth: bool = False,
        max_connections: int = 0,
        bitmaps: Sequence[DirtyBitmap] = (),
    ) -> None:
        """``bitmaps`` are shown as they are at each request. ConfigError for one that cannot be read."""
        for what, text in (("name", name), ("description", description)):
            if len(text.encode()) > MAX_STRING or "\0" in text:
                raise ConfigError(f"export {name[:64]!r}: its {what} must be at most {MAX_STRING} bytes, without NUL")
        self.name = name
        self.node = node
        self.description = description
        self.read_only = read_only or node.read_only
        self.bitmaps: dict[str, DirtyBitmap] = {}
        """By the name of their context."""
        for bitmap in bitmaps:
            bitmap.check_usable(reading=True)
            self.bitmaps[f"{DIRTY_BITMAP}{bitmap.name}"] = bitmap
        self.contexts = (BASE_ALLOCATION, *((ALLOCATION_DEPTH,) if allocation_depth else ()), *self.bitmaps)
        self.max_connections = max_connections
        self.connections = 0
        """Clients in transmission."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when the last of them has left."""
        self.on_failure: Callable[[str, Exception], None] = lambda name, error: None
        """Called for a request, by the name of its type, that is answered with an error of its disk."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.node.size

    @property
    def flags(self) -> int:
        """Transmission flags, but for those that depend on the reply mode."""
        return transmission_flags(
            read_only=self.read_only,
            fast_zero=self.node.top.zeroes_fast,
            multi_conn=self.max_connections != 1,
        )

    def admit(self) -> None:
        """OptionError(ERR_POLICY) when no further client may enter transmission."""
        if self.max_connections and self.connections >= self.max_connections:
            raise OptionError(REP_ERR_POLICY, f"export {self.name!r} has its {self.max_connections} clients already")


class ExportTable:
    """The exports by name. The empty name is the default export: the first one added, or the one so chosen."""

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}
        self.default: str | None = None

    def add(self, export: Export) -> None:
        """ConfigError when the name is taken."""
        if export.name in self._exports:
            raise ConfigError(
                f"two exports have the name {export.name!r}: give one of them another with NAME=IMAGE or -x"
            )
        self._exports[export.name] = export
        if self.default is None:
            self.default = export.name

    def remove(self, name: str) -> Export:
        """Take the export out; its clients are not touched. KeyError when there is none."""
        export = self._exports.pop(name)
        if self.default == name:
            self.default = next(iter(self._exports), None)
        return export

    def find(self, name: str) -> Export | None:
        """The export a client asks for."""
        if name in self._exports:
            return self._exports[name]
        return self._exports.get(self.default) if name == "" and self.default is not None else None

    def list(self) -> list[tuple[str, str]]:
        """``(name, description)`` of each, in the order of adding."""
        return [(export.name, export.description) for export in self._exports.values()]

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports.values())

    def __len__(self) -> int:
        return len(self._exports)
