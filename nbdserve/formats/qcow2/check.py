"""``image check`` for qcow2."""

from __future__ import annotations

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult, FormatDriver
from nbdserve.formats.qcow2.check_analysis import analyse
from nbdserve.formats.qcow2.check_repair import repair


async def check_qcow2(driver: FormatDriver, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
    """Check the image, and repair it on request; the figures are those of a last look after the repair.

    The image must be idle and its driver flushed. After a repair the driver's tables in memory are stale: release
    its storages without flushing it. ImageError when a repair is asked for on a read-only image.
    """
    if not (repair_leaks or repair_errors):
        return (await analyse(driver.storage)).result
    if driver.storage.read_only:
        raise ImageError(driver.path, "open read-only, so it cannot be repaired")
    return await repair(driver.storage, errors=repair_errors)
