"""Image locks that QEMU understands: one-byte OFD locks, advisory, held as long as the file is open.

A shared lock on byte ``100 + p`` says "I use permission p", one on byte ``200 + p`` says "I do not let others use
permission p". Nobody ever holds an exclusive lock: to look for a conflict, a process sets its own bytes and then
tests the complementary ones. Two processes that do so at the same time may both fail, but never both succeed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from typing import Final

from nbdserve.errors import ImageError

_USED_BASE: Final = 100
_UNSHARED_BASE: Final = 200

_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_RESIZE: Final = 3
_NAMES: Final = {_CONSISTENT_READ: "consistent read", _WRITE: "write", _RESIZE: "resize"}

_FLOCK: Final = struct.Struct("hhqqi0q")
_UNSUPPORTED: Final = frozenset((errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS))

_log: Final = logging.getLogger(__name__)


def lock_image(fd: int, path: str, write: bool, force_share: bool = False) -> None:
    """Take the locks of a writer or a reader of the image ``fd``; they end with its last duplicate.

    A writer refuses other writers and readers, a reader refuses writers. ``force_share`` (readers) refuses nobody.
    Raises ImageError naming ``path`` on a conflict. A file system without such locks is used with a warning.
    """
    used = (_CONSISTENT_READ, _WRITE, _RESIZE) if write else (_CONSISTENT_READ,)
    unshared = () if force_share else (_WRITE, _RESIZE)
    held = [_USED_BASE + permission for permission in used] + [_UNSHARED_BASE + permission for permission in unshared]
    try:
        for byte in held:
            _set(fd, byte, fcntl.F_RDLCK)
        conflict = next((p for p in unshared if _is_taken(fd, _USED_BASE + p)), None)
        if conflict is None:
            conflict = next((p for p in used if _is_taken(fd, _UNSHARED_BASE + p)), None)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise ImageError(path, f"cannot be locked: {error.strerror}") from error
        _log.warning("%s: its file system has no OFD locks: nothing keeps two writers apart", path)
        return
    if conflict is None:
        return
    for byte in held:
        _set(fd, byte, fcntl.F_UNLCK)
    hint = "stop that process" if write else "stop that process, or force sharing (-U) for a mere look"
    raise ImageError(path, f"is in use by another process ({_NAMES[conflict]} lock)", hint=hint)


def _set(fd: int, byte: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _is_taken(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock on ``byte``."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
