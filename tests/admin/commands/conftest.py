"""A server with an admin socket, on which commands can open the images of ``images.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.admin.control import Control
from tests.admin.images import make_images


@pytest.fixture
def images(tmp_path: Path, control: Control) -> Path:
    """The directory they are in, an image root."""
    directory = tmp_path / "images"
    directory.mkdir()
    make_images(directory)
    control.paths.add(directory)
    return directory
