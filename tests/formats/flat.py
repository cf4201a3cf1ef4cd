"""What the tests of formats with a one-level map share: stock tools, and opening with the smallest engine there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.storage.file import FileStorage
from tests.formats.qcow2 import engine
from tests.support import images

D = TypeVar("D", bound=FormatDriver)

read, write, change, mapping, agrees = engine.read, engine.write, engine.change, engine.mapping, engine.agrees
random_changes = engine.random_changes


async def make(path: Path, size: int, fmt: str, **options: str) -> Path:
    """An image made by our driver."""
    storage = await FileStorage.open(str(path), create=True)
    try:
        await driver_for(fmt).create(storage, size, options)
    finally:
        await storage.close()
    return path


async def open_with(driver: type[D], path: Path, *, read_only: bool = False, **options: Any) -> D:
    """The driver on the file ``path``."""
    storage = await FileStorage.open(str(path), read_only=read_only)
    try:
        return await driver.open(storage, options, read_only=read_only)
    except BaseException:
        await storage.close()
        raise


async def check_alone(driver: type[FormatDriver], path: Path, **how: bool) -> Any:
    """The check, on the writable file of a driver that is read-only, as the command opens it."""
    storage = await FileStorage.open(str(path))
    try:
        image = await driver.open(storage, {"has_backing": True}, read_only=True)
        return await image.check(**how)
    finally:
        await storage.close()


def content(path: Path, fmt: str) -> bytes:
    """The guest content as qemu-img reads it."""
    return images.raw_content(path, fmt, path.parent)
