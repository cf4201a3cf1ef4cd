"""Which files commands may name: those below the image roots, like the names in image headers, and secrets and sockets.

A name is opened and judged in one step (``ImageRoots``): a symbolic link put in its way meanwhile leads nowhere.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

from nbdserve.admin.errors import QmpError
from nbdserve.storage.file import FileStorage
from nbdserve.storage.roots import ImageRoots

T = TypeVar("T")

_IMAGE_HINT: Final = "outside the image roots; add its directory to image_roots of [server], or start with --image-root"
_PRIVATE_HINT: Final = "outside the roots for secrets and sockets; add its directory to roots of [admin]"


class PathPolicy:
    """The image roots. ``add`` is for the directories of the images that the server was started with."""

    def __init__(self, roots: Iterable[str | Path] = ()) -> None:
        self.roots: list[Path] = []
        for root in roots:
            self.add(root)

    def add(self, root: str | Path) -> None:
        """Files in this directory and below may be named."""
        real = Path(os.path.realpath(root))
        if real not in self.roots:
            self.roots.append(real)

    def image_roots(self) -> ImageRoots:
        """Those of the roots that are there now, for the names in headers."""
        return ImageRoots([root for root in self.roots if root.is_dir()])

    async def open(
        self, path: str, *, read_only: bool, cache: str = "writeback", force_share: bool = False
    ) -> FileStorage:
        """The file a command names, open and locked. QmpError in QEMU's words; ImageError for the lock."""
        fd = await asyncio.to_thread(self._open, path, os.O_RDONLY if read_only else os.O_RDWR)
        return await FileStorage.from_fd(fd, full_path(path), cache=cache, force_share=force_share)

    async def create(self, path: str) -> tuple[FileStorage, bool]:
        """The same for writing, empty, and whether it was made, which it is when there is none."""
        fd, is_new = await asyncio.to_thread(self._create, path)
        try:
            return await FileStorage.from_fd(fd, full_path(path), empty=True), is_new
        except BaseException:
            if is_new:
                await self.remove(path)
            raise

    async def remove(self, path: str) -> None:
        """Remove what ``create`` made. OSError."""
        await asyncio.to_thread(lambda: self.image_roots().remove(full_path(path)))

    def _open(self, path: str, flags: int) -> int:
        return _told(path, lambda: self.image_roots().open(full_path(path), flags))

    def _create(self, path: str) -> tuple[int, bool]:
        return _told(path, lambda: self.image_roots().create(full_path(path)), "create")


class PrivatePaths:
    """Where commands may name what is no image, that is, files with secrets, and sockets.

    Below the image roots, and below roots of their own, which no image header reaches.
    """

    def __init__(self, images: PathPolicy) -> None:
        self._images = images
        self._own = PathPolicy()

    def add(self, root: str | Path) -> None:
        """Such files may be named in this directory and below."""
        self._own.add(root)

    def _roots(self) -> ImageRoots:
        return ImageRoots([root for root in (*self._own.roots, *self._images.roots) if root.is_dir()])

    def open_secret(self, path: str, flags: int) -> int:
        """A regular file, or a block device. QmpError. Blocks."""
        return _told(path, lambda: self._roots().open(full_path(path), flags), hint=_PRIVATE_HINT)

    def directory_of(self, path: str) -> int:
        """The descriptor (O_PATH) of the directory a socket is to be in. QmpError. Blocks."""
        try:
            return self._roots().open_directory(str(Path(full_path(path)).parent))
        except OSError as error:
            problem = f"it is {_PRIVATE_HINT}" if error.errno == errno.EXDEV else error.strerror
            raise QmpError(f"Failed to bind socket to {path}: {problem}") from None


def full_path(path: str) -> str:
    """``path``, absolute. QmpError when it cannot be one."""
    if not path or "\0" in path:
        raise QmpError(f"Could not open '{path}': the file name is empty or contains a NUL")
    return os.path.abspath(path)  # noqa: PTH100 - symbolic links are kept


def _told(path: str, work: Callable[[], T], verb: str = "open", hint: str = _IMAGE_HINT) -> T:
    try:
        return work()
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise QmpError(f"Could not {verb} '{path}': it is {hint}") from None
        if error.errno == errno.EINVAL:
            raise QmpError(f"Could not {verb} '{path}': it is neither a regular file nor a block device") from None
        raise QmpError(f"Could not {verb} '{path}': {error.strerror}") from None
