"""Image roots: the directories below which a file named in an image header may be opened.

An image can come from anyone, so the names in its header are hostile: the kernel resolves them (openat2(2) with
RESOLVE_BENEATH), so that no ``..``, symbolic link or rename meanwhile leads out of a root.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from nbdserve.errors import ConfigError, ImageError
from nbdserve.storage.syscalls import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, openat2

_SCHEME: Final = re.compile(r"[^/]*:", re.DOTALL)
"""What QEMU takes for a protocol: a colon before the first slash."""

_KERNEL_TREES: Final = (Path("/dev"), Path("/proc"), Path("/sys"))
"""No images there, unless the user names a root inside: names in a header reach them through no root above."""


class ImageRoots:
    """A set of directories. The user names them, so they may be symbolic links themselves."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """ConfigError names a root that is no directory."""
        self._roots: list[tuple[Path, Path]] = []
        for root in roots:
            try:
                real = root.resolve(strict=True)
            except (OSError, RuntimeError) as error:
                raise ConfigError(f"image root {root}: {error}") from error
            if not real.is_dir():
                raise ConfigError(f"image root {root}: is not a directory")
            self._roots.append((Path(os.path.abspath(root)), real))  # noqa: PTH100 - keeps symbolic links

    @classmethod
    def of_image(cls, path: str) -> ImageRoots:
        """The directory of the image ``path`` and everything below it."""
        return cls([Path(path).parent])

    def open_beneath(self, path: str, *, relative_to: str, flags: int, field: str = "backing file") -> int:
        """Open what the ``field`` of the image ``relative_to`` names; the descriptor is the caller's. Blocks.

        A relative name is taken from the directory of ``relative_to``. Raises ImageError for what is not an ordinary
        name, lies outside every root, is neither a regular file nor a block device, or cannot be opened.
        """
        if not path:
            _refuse(relative_to, field, path, "an empty name")
        if "\0" in path:
            _refuse(relative_to, field, path, "a name with a NUL byte")
        if _SCHEME.match(path):
            hint = "only local files are opened; write ./ before a file name with a colon"
            _refuse(relative_to, field, path, "a protocol or JSON name is never followed", hint)
        directory = Path(relative_to).parent.resolve()
        # Not normalised: what ".." means after a symbolic link is the kernel's to say.
        target = path if path.startswith("/") else f"{directory}/{path}"
        try:
            return self._open(target, flags)
        except _NotAnImageError:
            _refuse(relative_to, field, path, "is neither a regular file nor a block device")
        except OSError as error:
            if error.errno == errno.EXDEV:
                hint = "move the file below one, or add a root"
                _refuse(relative_to, field, path, "leads outside the image roots", hint)
            _refuse(relative_to, field, path, f"cannot be opened: {error.strerror}")

    def open(self, path: str, flags: int) -> int:
        """Open the file that a user names by its absolute path; the descriptor is the caller's. Blocks.

        OSError: EXDEV outside of every root, EISDIR for a directory, EINVAL for what is no image for other reasons.
        """
        if any(Path(path) in pair for pair in self._roots):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        try:
            return self._open(path, flags | os.O_CLOEXEC)
        except _NotAnImageError as error:
            code = errno.EISDIR if error.is_directory else errno.EINVAL
            raise OSError(code, os.strerror(code), path) from None

    def create(self, path: str) -> tuple[int, bool]:
        """As ``open`` for reading and writing, and whether the file was made, which it is when there is none."""
        directory, name = os.path.split(path)
        parent = self.open_directory(directory)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(name, flags, 0o644, dir_fd=parent), True
        except FileExistsError:
            return self.open(path, os.O_RDWR), False
        finally:
            os.close(parent)

    def open_directory(self, path: str) -> int:
        """A directory that a user names by its absolute path, as O_PATH; the descriptor is the caller's. OSError."""
        return self._open(f"{path}/", os.O_PATH | os.O_CLOEXEC, _open_directory)

    def remove(self, path: str) -> None:
        """Remove what ``create`` made. OSError."""
        directory, name = os.path.split(path)
        parent = self.open_directory(directory)
        try:
            os.unlink(name, dir_fd=parent)
        finally:
            os.close(parent)

    def _open(self, target: str, flags: int, opener: Callable[[Path, str, int], int] | None = None) -> int:
        """OSError(EXDEV) when no root has ``target``; a name that does not begin with a root is not even looked up."""
        opener = opener or _open_image
        places = self._places(target)
        fd = _open_first(places, flags, opener)
        if fd is None and places:
            # The kernel refuses absolute symbolic links even to a place below the root, so resolve it and ask again.
            resolved = os.path.realpath(target) + ("/" if target.endswith("/") else "")
            fd = _open_first(self._places(resolved), flags, opener)
        if fd is None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), target)
        return fd

    def _places(self, name: str) -> list[tuple[Path, str]]:
        """Each root that ``name`` begins with, and the rest of it."""
        return [
            (real, rest)
            for given, real in self._roots
            for prefix in dict.fromkeys((given, real))
            if (rest := _below(name, prefix)) is not None
        ]


class _NotAnImageError(Exception):
    """A directory, FIFO, socket or character device."""

    def __init__(self, *, is_directory: bool) -> None:
        self.is_directory = is_directory


def _refuse(image: str, field: str, value: str, problem: str, hint: str = "") -> NoReturn:
    raise ImageError(image, problem, field=field, value=value, hint=hint)


def _below(name: str, root: Path) -> str | None:
    """``name`` relative to ``root``, or None if it does not begin with it."""
    prefix = f"{root}/" if root != Path("/") else "/"
    return name[len(prefix) :].lstrip("/") if name.startswith(prefix) else None


def _open_first(places: Sequence[tuple[Path, str]], flags: int, opener: Callable[[Path, str, int], int]) -> int | None:
    """Open below the first root that the name does not lead out of."""
    for root, rest in places:
        try:
            return opener(root, rest, flags)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
    return None


def _open_image(root: Path, rest: str, flags: int) -> int:
    """Open an image below ``root``, having looked first: opening a FIFO waits and opening a device can act."""
    looked = _open_below(root, rest, os.O_PATH)
    try:
        seen = os.fstat(looked)
        if not (stat.S_ISREG(seen.st_mode) or stat.S_ISBLK(seen.st_mode)):
            raise _NotAnImageError(is_directory=stat.S_ISDIR(seen.st_mode))
        where = Path(f"/proc/self/fd/{looked}").readlink()
        if any(where.is_relative_to(tree) and not root.is_relative_to(tree) for tree in _KERNEL_TREES):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        fd = _open_below(root, rest, flags)
        if not os.path.samestat(seen, os.fstat(fd)):
            os.close(fd)
            raise OSError(errno.ESTALE, "it was replaced while it was opened")
        return fd
    finally:
        os.close(looked)


def _open_directory(root: Path, rest: str, flags: int) -> int:
    """Open a directory below ``root``, or ``root`` itself."""
    return os.open(root, flags | os.O_DIRECTORY) if not rest else _open_below(root, rest, flags | os.O_DIRECTORY)


def _open_below(root: Path, rest: str, flags: int) -> int:
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        return openat2(root_fd, rest, flags, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
    except OSError as error:
        # Before Linux 5.6, or under a seccomp filter that does not know the call.
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        return _walk(root_fd, rest, flags)
    finally:
        os.close(root_fd)


def _walk(root_fd: int, rest: str, flags: int) -> int:
    """The same without openat2: one component at a time, following no link. OSError(EXDEV) at a link or ``..``."""
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    directory = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = below
            if stat.S_ISLNK(os.fstat(directory).st_mode):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        fd = os.open(parts[-1], flags | os.O_NOFOLLOW, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV)) from error
        raise
    finally:
        os.close(directory)
    if flags & os.O_PATH and stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return fd
