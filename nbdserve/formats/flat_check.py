"""What the checks of the formats with a one-level map have in common, and the steps of their repairs."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import Final

from nbdserve.formats.base import CheckResult
from nbdserve.formats.flat_image import FlatImage
from nbdserve.formats.flat_map import Scan

_LISTED: Final = 20
"""Messages of one kind."""


class FlatCheck(ABC):
    """One look at an image. It reads what is on disk, whatever the driver has in memory."""

    def __init__(self, image: FlatImage) -> None:
        self.image = image
        self.storage = image.storage

    @abstractmethod
    async def judge(self) -> CheckResult:
        """What is wrong now."""

    @abstractmethod
    async def repair(self, *, leaks: bool, errors: bool) -> None:
        """Mend. Each step is stable before the next; a crash leaves what another repair mends."""

    async def run(self, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
        """The result; with a repair that of a second look, and what was mended."""
        result = await self.judge()
        errors, leaks = repair_errors and result.corruptions > 0, repair_leaks and result.leaks > 0
        if not self.can_mend(result, leaks=leaks, errors=errors):
            return result
        await self.repair(leaks=leaks, errors=errors)
        after = await self.judge()
        after.corruptions_fixed = result.corruptions - after.corruptions
        after.leaks_fixed = max(0, result.leaks - after.leaks)
        after.messages = [*result.messages, *after.messages]
        return after

    def can_mend(self, result: CheckResult, *, leaks: bool, errors: bool) -> bool:
        """Whether there is anything to be mended, and it may be."""
        return leaks or errors

    def blame(self, result: CheckResult, found: Scan) -> None:
        """Count the words that refer to what they must not."""
        image = self.image
        for blocks, problem in (
            (found.outside, f"is {image.outside_means}"),
            (found.duplicates, f"shares its place with another {image.unit_called}"),
        ):
            result.corruptions += len(blocks)
            result.messages += [
                f"ERROR: the {image.unit_called} at guest offset {block * image.cluster_size:#x} {problem}"
                for block in blocks[:_LISTED]
            ]

    async def entry(self, block: int) -> int:
        """The word of ``block``."""
        return int.from_bytes(await self.storage.read(self.image.map.host_offset + block * 4, 4), "little")

    async def write_entry(self, block: int, word: int) -> None:
        """Change the word of ``block``. Not stable on return."""
        await self.storage.write(self.image.map.host_offset + block * 4, struct.pack("<I", word))
