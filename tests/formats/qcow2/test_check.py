import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.check import check_qcow2
from nbdserve.formats.qcow2.create import create_qcow2
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.storage.memory import MemoryStorage


async def new_image() -> MemoryStorage:
    storage = MemoryStorage()
    await create_qcow2(storage, 10 << 20, {"preallocation": "metadata"})
    return storage


async def test_a_new_image_is_clean() -> None:
    driver = await Qcow2Driver.open(await new_image(), {}, read_only=True)
    result = await check_qcow2(driver)
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert (result.allocated_clusters, result.total_clusters, result.fragmented_clusters) == (160, 160, 0)
    assert result.image_end_offset == driver.storage.size


async def test_a_leak_is_found_and_repaired() -> None:
    storage = await new_image()
    await storage.truncate(storage.size + (1 << 20))
    await storage.write(0x20000 + 2 * 170, b"\0\1\0\1")
    driver = await Qcow2Driver.open(storage, {}, read_only=True)
    assert (await check_qcow2(driver)).leaks == 2
    result = await check_qcow2(driver, repair_leaks=True)
    assert (result.leaks, result.leaks_fixed, result.corruptions) == (0, 2, 0)


async def test_a_read_only_image_is_not_repaired() -> None:
    storage = await new_image()
    storage.read_only = True
    driver = await Qcow2Driver.open(storage, {}, read_only=True)
    with pytest.raises(ImageError, match="read-only"):
        await check_qcow2(driver, repair_errors=True)
