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
from nbdserve.storage.directory import sync_parent
from nbdserve.storage.file import FileStorage


class Beside:
    """A directory beside the file ``path``, for making a file of the same name, and those that belong to it, in it.

    Images hold the names of their files, so each is made under the name it will have.
    """

    def __init__(self, path: str) -> None:
        self.target = os.path.realpath(path)
        """Where a symbolic link leads: that file is replaced, and not the link."""
        self._name = os.path.basename(self.target)  # noqa: PTH119 - a name, not a path to walk
        self._directory: str | None = None
        self._old: list[FileStorage] = []

    @property
    def path(self) -> str:
        """The file to make."""
        assert self._directory is not None
        return f"{self._directory}/{self._name}"

    @property
    def replaces(self) -> bool:
        """There is a file under this name already."""
        return any(old.path == self.target for old in self._old)

    async def open(self, companions: Sequence[str] = ()) -> None:
        """Make the directory; what is there already is locked, so that nothing is replaced that is in use.

        ``companions`` are the other files that ``publish`` will name. OSError names the file to make.
        """
        beside = os.path.dirname(self.target)  # noqa: PTH120 - as the names are put together
        try:
            for path in (self.target, *(os.path.join(beside, name) for name in companions)):  # noqa: PTH118
                if await asyncio.to_thread(os.path.lexists, path):
                    self._old.append(await FileStorage.open(path))
            try:
                self._directory = tempfile.mkdtemp(prefix=".nbdserve.", dir=beside)
            except OSError as error:
                error.filename = self.target
                raise
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
        while self._old:
            await self._old.pop().close()


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
