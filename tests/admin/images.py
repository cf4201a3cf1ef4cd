"""Images for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.processes import needs, output

needs_images: pytest.MarkDecorator = needs("qemu-img")


def make_images(directory: Path) -> None:
    """a.qcow2 and b.raw of 1 MiB, and o.qcow2 over the first."""
    output("qemu-img", "create", "-q", "-f", "qcow2", directory / "a.qcow2", "1M")
    output("qemu-img", "create", "-q", "-f", "raw", directory / "b.raw", "1M")
    output("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", directory / "o.qcow2")
