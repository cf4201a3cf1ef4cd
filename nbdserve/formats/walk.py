"""Going over the mapping of an image, where single runs count and not their number."""

from __future__ import annotations

from collections.abc import AsyncIterator

from nbdserve.extents import Run
from nbdserve.formats.base import FormatDriver


async def loaded_runs(driver: FormatDriver, start: int, end: int) -> AsyncIterator[tuple[int, Run]]:
    """What ``lookup`` says of ``[start, end)``, run by run, each with its offset; tables are loaded on the way.

    OSError, or RequestError(EIO) for a corrupt table.
    """
    while start < end:
        run = driver.lookup(start, end - start)
        if run is None:
            await driver.load(start)
            continue
        yield start, run
        start += run[1]
