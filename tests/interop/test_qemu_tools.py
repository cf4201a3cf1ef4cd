"""qemu-img and qemu-io against the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.tools import make_disk, tool

KINDS = pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])


@KINDS
def test_qemu_img_reads_the_export(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    plain, copied = tmp_path / "plain.raw", tmp_path / "copied.qcow2"
    plain.write_bytes(content)
    with serve(image, image_format) as server:
        info = json.loads(tool("qemu-img", "info", "-f", "raw", "--output", "json", server.uri()))
        assert info["virtual-size"] == len(content)
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", plain, server.uri())
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), copied)
        extents = json.loads(tool("qemu-img", "map", "-f", "raw", "--output", "json", server.uri()))
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", plain, copied)
    end = 0
    for extent in extents:
        assert extent["start"] == end
        end += extent["length"]
        if extent["zero"]:
            assert not any(content[extent["start"] : end])
    assert end == len(content)


@KINDS
def test_qemu_img_writes_the_export(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, b"\x77" * len(content))
    plain = tmp_path / "plain.raw"
    plain.write_bytes(content)
    with serve(image, image_format) as server:
        tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", plain, server.uri())
    tool("qemu-img", "compare", "-f", "raw", "-F", image_format, plain, image)
    if image_format == "qcow2":
        tool("qemu-img", "check", "-q", image)


@KINDS
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_qemu_io_patterns(serve: Serve, tmp_path: Path, content: bytes, kind: str, cache: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    steps = [
        *(
            "write -P 1 0 64k",
            "write -P 2 100000 5000",
            "write -z 1M 1M",
            "write -z -u 2M 128k",
            "write -f -P 3 3M 512",
        ),
        *("discard 7M 64k", "flush", "aio_write -P 4 8M 1M", "aio_write -P 5 9M 1M", "aio_flush"),
        *("read -P 1 0 64k", "read -P 2 100000 5000", "read -P 0 1M 1M", "read -P 0 2M 128k", "read -P 3 3M 512"),
        *("read -P 4 8M 1M", "read -P 5 9M 1M"),
    ]
    commands = [word for step in steps for word in ("-c", step)]
    with serve(image, image_format) as server:
        said = tool("qemu-io", "-f", "raw", "-t", cache, *commands, server.uri())
        assert "Pattern verification failed" not in said
        assert "failed" not in said
    reread = [word for step in steps if step.startswith("read") for word in ("-c", step)]
    said = tool("qemu-io", "-r", "-f", image_format, *reread, image)
    assert "Pattern verification failed" not in said
    if image_format == "qcow2":
        tool("qemu-img", "check", "-q", image)


def test_qemu_img_check_finds_nothing_after_the_server_and_qemu_took_turns(
    serve: Serve, tmp_path: Path, content: bytes
) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    for turn in range(1, 4):
        with serve(image, image_format) as server:
            tool("qemu-io", "-f", "raw", "-c", f"write -P {turn} {turn}M 300k", server.uri())
        tool("qemu-io", "-f", image_format, "-c", f"write -P {turn + 10} {turn + 4}M 300k", image)
        tool("qemu-img", "check", "-q", image)
    with serve(image, image_format, "-r") as server:
        for turn in range(1, 4):
            for place, pattern in ((turn, turn), (turn + 4, turn + 10)):
                said = tool("qemu-io", "-r", "-f", "raw", "-c", f"read -P {pattern} {place}M 300k", server.uri())
                assert "Pattern verification failed" not in said
