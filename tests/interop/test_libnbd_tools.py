"""nbdinfo and nbdcopy against the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.tools import make_disk, tool

KINDS = pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])
MIB = 1 << 20


@KINDS
def test_nbdinfo_describes_the_export(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    with serve(image, image_format, "-x", "disk one", "-D", "a test") as server:
        uri = server.uri("disk%20one")
        said = json.loads(tool("nbdinfo", "--json", uri))
        assert said["protocol"] == "newstyle-fixed"
        assert said["structured"] is True
        export = said["exports"][0]
        assert export["export-name"] == "disk one"
        assert export["description"] == "a test"
        assert export["export-size"] == len(content)
        assert export["is_read_only"] is False
        assert export["can_multi_conn"] is True
        assert export["block_size_minimum"] == 1
        assert "base:allocation" in export["contexts"]
        assert tool("nbdinfo", "--size", uri).strip() == str(len(content))
        tool("nbdinfo", "--can", "zero", uri)
        tool("nbdinfo", "--is", "read-only", uri, code=2)


def test_nbdinfo_lists_the_exports(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "raw", content)
    with serve(image, image_format, "-x", "first", "-D", "the first") as server:
        exports = json.loads(tool("nbdinfo", "--list", "--json", server.uri()))["exports"]
        assert [(export["export-name"], export["description"]) for export in exports] == [("first", "the first")]


@KINDS
def test_nbdinfo_maps_the_export(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    with serve(image, image_format) as server:
        extents = json.loads(tool("nbdinfo", "--map", "--json", server.uri()))
        end = 0
        for extent in extents:
            assert extent["offset"] == end
            end += extent["length"]
            if extent["type"] & 2:
                assert not any(content[extent["offset"] : end])
        assert end == len(content)
        totals = json.loads(tool("nbdinfo", "--map", "--totals", "--json", server.uri()))
        assert sum(total["size"] for total in totals) == len(content)
    if kind == "qcow2":  # qemu-img convert has left the zeroes out
        assert [(e["offset"], e["length"]) for e in extents if e["type"] & 2] == [
            (4 * MIB, 2 * MIB),
            (10 * MIB, MIB),
        ]


@KINDS
def test_nbdcopy_down(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    target = tmp_path / "out.raw"
    with serve(image, image_format) as server:
        tool("nbdcopy", server.uri(), target)
        assert target.read_bytes() == content
        target.unlink()
        tool("nbdcopy", "--synchronous", "--connections=1", server.uri(), target)
        assert target.read_bytes() == content


@KINDS
def test_nbdcopy_up_and_flush(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, bytes(len(content)))
    source = tmp_path / "source.raw"
    source.write_bytes(content)
    with serve(image, image_format) as server:
        tool("nbdcopy", "--flush", source, server.uri())
    tool("qemu-img", "compare", "-f", "raw", "-F", image_format, source, image)
    if image_format == "qcow2":
        tool("qemu-img", "check", "-q", image)


def test_nbdcopy_over_tcp_with_four_connections(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    target = tmp_path / "out.raw"
    with serve(image, image_format, tcp=True) as server:
        tool("nbdcopy", "--connections=4", server.uri(), target)
    assert target.read_bytes() == content
