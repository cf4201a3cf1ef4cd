"""``nbdserve image``: making, copying and looking at image files, with qemu-img's names, units and exit codes."""

from __future__ import annotations

from nbdserve.cli.image.commands import app

__all__ = ["app"]
