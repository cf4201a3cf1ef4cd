"""A cluster of its own for guest bytes, where a driver itself decides where they go: beside compressed ones."""

from __future__ import annotations

from nbdserve.formats.base import FormatDriver


async def write_new(driver: FormatDriver, offset: int, data: memoryview) -> None:
    """Write ``data``, whole clusters held exclusively, to new space, and show it. OSError, RequestError."""
    while (allocation := driver.allocate(offset, len(data))) is None:
        await driver.prepare(offset, len(data))
    try:
        await driver.data.write(allocation.host_offset, data)
    except BaseException:
        driver.abandon(allocation)
        raise
    driver.publish(allocation)
