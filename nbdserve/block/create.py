"""Making the files of an image."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.create_options import parse_boolean
from nbdserve.storage.directory import sync_parent
from nbdserve.storage.file import FileStorage

_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW_FL: Final = 0x00800000


async def create_files(
    driver: type[FormatDriver],
    paths: Sequence[str],
    size: int,
    options: Mapping[str, str],
    *,
    backing: FormatDriver | None = None,
    secret: bytes | None = None,
    cache: str = "writeback",
) -> None:
    """Make an image of ``size`` bytes of the files ``paths``: its own first, then its ``created_companions``.

    The options are checked already. Files that were not there before are removed again when it fails. OSError,
    ImageError; ConfigError, with nothing changed, for a file that is to be kept and has not the size of the disk.
    """
    made = _missing(paths)
    if parse_boolean(options, "nocow"):
        for path in paths:
            _turn_off_cow(path)
    storages: dict[str, FileStorage] = {}
    try:
        if driver.keeps_companions:  # these first: opened to be made anew, a file is emptied
            for path in paths[1:]:
                if path in made:
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
                storages[path] = await FileStorage.open(path, cache=cache)
                if path not in made:
                    _check_kept(storages[path], driver.created_size(size, options))
        for path in paths:
            if path not in storages:
                storages[path] = await FileStorage.open(path, create=True, cache=cache)
        own, *companions = (storages[path] for path in paths)
        await driver.create(own, size, options, companions=companions, backing=backing, secret=secret)
        if cache != "unsafe":
            for path in made:
                await sync_parent(path)
    except BaseException:
        _remove(made)
        raise
    finally:
        for storage in storages.values():
            await storage.close()


def _check_kept(storage: FileStorage, size: int) -> None:
    """ConfigError unless a file that is kept can be part of a disk of ``size`` bytes as it is."""
    if storage.size != size:
        raise ConfigError(
            f"{storage.path}: it is there and has {storage.size} bytes, the disk has {size}: a file that is there is "
            f"not made longer or shorter; give the image its size, or give a file of {size} bytes, or a new name"
        )


def _missing(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not os.path.lexists(path)]


def _remove(paths: list[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def _turn_off_cow(path: str) -> None:
    """Set the NOCOW attribute on a new or empty file; only btrfs has it, and elsewhere it does nothing."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return
    try:
        flags = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(4)))[0]
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", flags | _FS_NOCOW_FL))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    finally:
        os.close(fd)
