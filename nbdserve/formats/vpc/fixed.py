"""Fixed VHDs: the disk as it is, with a footer behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbdserve.errors import ConfigError, CorruptImageError
from nbdserve.extents import DATA, Run, RunArray, RunStream
from nbdserve.formats.base import Allocation, BackingReference, FormatDriver, ImageInfo
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.formats.vpc.layout import Footer
from nbdserve.formats.vpc.resize import resize_fixed


class FixedDriver(VpcDriver):
    """One open fixed image: nothing in it changes but guest data."""

    async def _open(self, options: Mapping[str, Any], *, read_only: bool) -> None:
        end = self.storage.size - (self.footers.end_size if self.footers.end is not None else 0)
        if self.size > end:
            raise CorruptImageError(
                self.path,
                f"there are only {end} bytes in front of the footer",
                field="virtual size",
                value=self.size,
            )
        self.cluster_size = self.granularity = 1
        self.zeroes_fast = self.keeps_places = True
        self.read_only = read_only

    def info(self) -> ImageInfo:
        return ImageInfo(self.name, self.size)

    def lookup(self, offset: int, length: int) -> Run:
        return DATA, length, offset

    def lookup_writable(self, offset: int, length: int) -> Run:
        return DATA, length, offset

    async def load(self, offset: int) -> None:
        """There are no tables."""

    async def prepare(self, offset: int, length: int) -> None:
        """There is nothing to allocate."""

    def allocate(self, offset: int, length: int) -> Allocation:
        """Never called: everything is DATA."""
        raise NotImplementedError

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """What is a hole, the storage knows."""
        while start < end:
            runs: RunArray = await self.data.host_map(start, end - start)
            start = int(runs.start[-1] + runs.length[-1])
            yield RunArray(runs.start, runs.length, runs.kind, runs.start)

    async def _resize(self, larger: Footer) -> None:
        await resize_fixed(self.storage, self.footer, larger)

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """It has no parent."""
        if reference is not None:
            raise ConfigError(f"{self.path}: a fixed VHD cannot have a parent")
        await self.flush()

    async def _settle(self) -> None:
        pass

    async def close(self) -> None:
        """Flush and release; there is no clean-close mark."""
        try:
            if not self.read_only:
                await self.flush()
        finally:
            await self.storage.close()
