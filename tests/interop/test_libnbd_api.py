"""libnbd's Python bindings against the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.tools import make_disk, tool

PYTHON = "/usr/bin/python3"
"""The Python that python3-libnbd is built for."""
SCRIPT = Path(__file__).with_name("libnbd_checks.py")


@pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])
@pytest.mark.parametrize(
    "check",
    [
        "structured_reads",
        "simple_replies",
        "fua_and_flush",
        "zeroes",
        "trim_and_cache",
        "block_status",
        "errors",
        "in_flight",
    ],
)
def test_a_writable_export(serve: Serve, tmp_path: Path, content: bytes, kind: str, check: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    with serve(image, image_format) as server:
        tool(PYTHON, SCRIPT, check, server.uri())
    if image_format == "qcow2":
        tool("qemu-img", "check", "-q", image)


@pytest.mark.parametrize("kind", ["raw", "chain"])
def test_a_read_only_export(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    before = image.read_bytes()
    with serve(image, image_format, "-r") as server:
        for check in ("read_only", "structured_reads", "block_status"):
            tool(PYTHON, SCRIPT, check, server.uri())
    assert image.read_bytes() == before


@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_trim_with_and_without_discard(serve: Serve, tmp_path: Path, content: bytes, discard: str) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    with serve(image, image_format, f"--discard={discard}") as server:
        for check in ("trim_and_cache", "fua_and_flush", "block_status"):
            tool(PYTHON, SCRIPT, check, server.uri())
    tool("qemu-img", "check", "-q", image)


def test_two_contexts_through_a_chain(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    with serve(image, image_format, "-A") as server:
        tool(PYTHON, SCRIPT, "both_contexts", server.uri())


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_requests_of_64_mib(serve: Serve, tmp_path: Path, image_format: str) -> None:
    image = tmp_path / "large"
    tool("qemu-img", "create", "-q", "-f", image_format, image, "80M")
    with serve(image, image_format) as server:
        tool(PYTHON, SCRIPT, "large_requests", server.uri())
