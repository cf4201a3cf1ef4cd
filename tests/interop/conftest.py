"""A server process per test, and the tools run against it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from tests.interop.hostile import make_image
from tests.interop.tools import Server, running_server

Serve = Callable[..., AbstractContextManager[Server]]
DISK_SIZE = 16 << 20


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """``with serve(image, format, *options, tcp=False) as server``: the server of one image, ended on leaving."""

    def start(
        image: Path, image_format: str = "raw", *options: str, tcp: bool = False
    ) -> AbstractContextManager[Server]:
        return running_server(tmp_path, image, image_format, options, tcp=tcp)

    return start


@pytest.fixture
def content() -> bytes:
    """16 MiB of a disk: random bytes, but for zeroes in [4, 6) and [10, 11) MiB."""
    data = bytearray(np.random.default_rng(5).bytes(DISK_SIZE))
    for start, end in ((4, 6), (10, 11)):
        data[start << 20 : end << 20] = bytes((end - start) << 20)
    return bytes(data)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path)
