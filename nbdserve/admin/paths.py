"""Which files commands may name: those below the image roots, like the names in image headers."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from nbdserve.admin.errors import QmpError


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

    async def check(self, path: str, *, exists: bool = True) -> str:
        """``path``, absolute. QmpError where it leads outside the roots, or, with ``exists``, nowhere."""
        return await asyncio.to_thread(self._check, path, exists)

    def _check(self, path: str, exists: bool) -> str:
        if not path or "\0" in path:
            raise QmpError(f"Could not open '{path}': the file name is empty or contains a NUL")
        full = os.path.abspath(path)  # noqa: PTH100 - symbolic links are kept
        if not any(Path(os.path.realpath(full)).is_relative_to(root) for root in self.roots):
            raise QmpError(
                f"Could not open '{path}': it is outside the image roots; add its directory to image_roots "
                "of [server], or start with --image-root"
            )
        if exists:
            try:
                status = Path(full).stat()
            except OSError as error:
                raise QmpError(f"Could not open '{path}': {error.strerror}") from None
            if stat.S_ISDIR(status.st_mode):
                raise QmpError(f"Could not open '{path}': Is a directory")
        return full
