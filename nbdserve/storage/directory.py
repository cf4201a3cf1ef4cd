"""The directories that image files are in."""

from __future__ import annotations

import os
from pathlib import Path

from nbdserve.storage.pool import worker_pool


async def sync_parent(path: str) -> None:
    """Make the creation, renaming or removal of ``path`` itself stable: fsync of the directory it is in."""
    await worker_pool().run(sync_directory_of, path)


def sync_directory_of(path: str) -> None:
    """fsync of the directory ``path`` is in."""
    fd = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
