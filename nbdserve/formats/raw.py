"""raw: no metadata; the disk is the file, or a window of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import DATA, Run, RunArray, RunStream
from nbdserve.formats.base import CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.reserve import reserve
from nbdserve.storage.base import Storage


class RawDriver(FormatDriver):
    """The bytes of a storage as a disk. Every byte is DATA here; what is a hole, the storage knows (``iter_runs``)."""

    name = "raw"
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "Virtual disk size"),
        CreateOption("preallocation", "Preallocation mode (allowed values: off, falloc, full)", "off"),
        CreateOption("nocow", "Turn off copy-on-write (valid only on btrfs)", "off"),
    )

    preallocation_modes: ClassVar[tuple[str, ...]] = ("falloc", "full")
    abandons_freely: ClassVar[bool] = True

    def __init__(self, storage: Storage, window_offset: int, size: int, *, read_only: bool) -> None:
        self.path = storage.path
        self.read_only = read_only
        self.storage = self.data = storage
        self.size = size
        self.cluster_size = self.granularity = 1
        self.zeroes_fast = self.keeps_places = True
        self._window_offset = window_offset

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Options: ``offset`` and ``size`` of the window, bytes; the window must lie inside the file."""
        offset = options.get("offset", 0)
        size = options.get("size")
        if offset > storage.size:
            raise ImageError(
                storage.path,
                f"the file has only {storage.size} bytes",
                field="offset",
                value=offset,
                hint="give a smaller --offset",
            )
        if size is None:
            size = storage.size - offset
        elif offset + size > storage.size:
            raise ImageError(
                storage.path,
                f"the window ends past the end of the file ({storage.size} bytes)",
                field="size",
                value=size,
            )
        return cls(storage, offset, size, read_only=read_only)

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """The names, and ``preallocation``."""
        cls.check_option_names(options)
        preallocation = options.get("preallocation", "off")
        if preallocation not in {"off", "falloc", "full"}:
            raise ConfigError(f"preallocation={preallocation}: raw images take off, falloc or full")

    @classmethod
    async def create(
        cls,
        storage: Storage,
        size: int,
        options: Mapping[str, str],
        *,
        companions: Sequence[Storage] = (),
        backing: FormatDriver | None = None,
        secret: bytes | None = None,
    ) -> None:
        """A sparse file of ``size`` bytes; ``preallocation=falloc|full`` reserves or writes it."""
        cls.validate_create(size, options)
        await storage.truncate(size)
        await reserve(storage, 0, size, options.get("preallocation", "off"))
        await storage.flush()

    def info(self) -> ImageInfo:
        return ImageInfo("raw", self.size)

    def lookup(self, offset: int, length: int) -> Run:
        return DATA, length, offset + self._window_offset

    def linear_offset(self) -> int:
        return self._window_offset

    def lookup_writable(self, offset: int, length: int) -> Run:
        return DATA, length, offset + self._window_offset

    async def iter_runs(self, start: int, end: int) -> RunStream:
        while start < end:
            runs = await self.data.host_map(start + self._window_offset, end - start)
            start = int(runs.start[-1] + runs.length[-1]) - self._window_offset
            yield RunArray(runs.start - self._window_offset, runs.length, runs.kind, runs.start)

    async def resize(self, size: int) -> None:
        """Cut the file or make it longer."""
        if self._window_offset or self.size != self.storage.size:
            raise ConfigError(f"{self.path}: a window of a file cannot be resized")
        await self.storage.truncate(size)
        self.size = size
        await self.flush()

    async def preallocate(self, start: int, end: int, mode: str) -> None:
        """Reserve the end of the file, or write zeroes to it."""
        await reserve(self.storage, start, end - start, mode)
        await self.flush()

    async def close(self) -> None:
        """Flush and release; raw has no clean-close mark."""
        try:
            if not self.read_only:
                await self.flush()
        finally:
            await self.storage.close()
