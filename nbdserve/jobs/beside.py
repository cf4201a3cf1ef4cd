"""New files made beside those they are to replace, which stay as they are until the new ones are complete."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nbdserve.errors import ConfigError, ImageError
from nbdserve.storage.file import FileStorage, sync_parent


class Beside:
    """A directory beside the file ``path``, for making a file of the same name, and those that belong to it, in it.

    Images hold the names of their files, so each is made under the name it will have.
    """

    def __init__(self, path: str) -> None:
        self.target = os.path.realpath(path)
        """Where a symbolic link leads: that file is replaced, and not the link."""
        self._name = os.path.basename(self.target)  # noqa: PTH119 - a name, not a path to walk
        self._directory: str | None = None
        self._old: FileStorage | None = None

    @property
    def path(self) -> str:
        """The file to make."""
        assert self._directory is not None
        return f"{self._directory}/{self._name}"

    @property
    def replaces(self) -> bool:
        """There is a file under this name already."""
        return self._old is not None

    async def open(self) -> None:
        """Make the directory; a file that is there already is locked, so that none is replaced that is in use."""
        if await asyncio.to_thread(os.path.lexists, self.target):
            self._old = await FileStorage.open(self.target)
        try:
            self._directory = tempfile.mkdtemp(prefix=f".{self._name[:100]}.", dir=Path(self.target).parent)
        except BaseException:
            await self.close()
            raise

    async def publish(self, companions: Sequence[str] = (), *, sync: bool) -> None:
        """Give the files their names: those in ``companions``, relative to the image, first, the image last.

        With ``sync`` the names are stable on return; the files themselves are to be before. ImageError when a name is
        given, and is not stable.
        """
        assert self._directory is not None
        for name in (*companions, self._name):
            target = _rename(self._directory, name, os.path.dirname(self.target))  # noqa: PTH120
            if sync:
                try:
                    await sync_parent(target)
                except OSError as error:
                    problem = f"is complete, but the directory it is in could not be synced: {error.strerror}"
                    raise ImageError(target, problem) from error

    async def close(self) -> None:
        """Remove what has no name yet."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        if self._old is not None:
            await self._old.close()
            self._old = None


def _rename(directory: str, name: str, to: str) -> str:
    """Move a file, over one that may be there, whose mode and owner it gets; its new path."""
    source, target = Path(directory, name), Path(to, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = target.stat()
        source.chmod(stat.S_IMODE(old.st_mode))
        with contextlib.suppress(PermissionError):
            os.chown(source, old.st_uid, old.st_gid)
    source.replace(target)
    return str(target)


def check_companion(path: str, name: str) -> None:
    """ConfigError for a file of the image ``path`` that could not be made beside it."""
    if name.startswith("/") or ".." in Path(name).parts:
        raise ConfigError(
            f"{path}: its file {name!r} cannot be made beside the one that it replaces: "
            "give a name in the directory of the image, or make the image first and use -n"
        )
