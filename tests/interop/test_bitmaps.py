"""Bitmaps stored in qcow2 images, as clients see them: what qemu-nbd shows, this server shows."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.processes import greets, until
from tests.interop.conftest import Serve
from tests.interop.tools import tool

NAMES = ("base0", "base1", "top0")


def make_chain(directory: Path) -> Path:
    """Two images with bitmaps of several granularities, one of them disabled in between."""
    base, top = directory / "base.qcow2", directory / "top.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", base, "64M")
    for name, granularity in (("base0", "64k"), ("base1", "512")):
        tool("qemu-img", "bitmap", "--add", "-g", granularity, base, name)
    tool("qemu-io", "-f", "qcow2", "-c", "write 1M 300k", "-c", "write 20M 10k", "-c", "discard 30M 1M", base)
    tool("qemu-img", "bitmap", "--disable", base, "base1")
    tool("qemu-io", "-f", "qcow2", "-c", "write 40M 300k", base)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, "70M")
    tool("qemu-img", "bitmap", "--add", "-g", "128k", top, "top0")
    tool("qemu-io", "-f", "qcow2", "-c", "write -z 0 4M", "-c", "write 69M 1M", top)
    return top


@contextmanager
def stock(directory: Path, image: Path, *options: str) -> Iterator[str]:
    """The URI of qemu-nbd."""
    path = directory / "stock.sock"
    process = subprocess.Popen(["qemu-nbd", "-t", "-e", "4", "-k", path, *options, image])
    try:
        until(lambda: greets(path), "qemu-nbd answers")
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait(60)


def seen(uri: str, socket: str) -> list[object]:
    """All that tools say of the bitmaps."""
    said: list[object] = [json.loads(tool("nbdinfo", "--json", uri))["exports"][0]["contexts"]]
    for name in NAMES:
        said.append(json.loads(tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri)))
        opts = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        said.append(json.loads(tool("qemu-img", "map", "--output=json", "--image-opts", opts)))
    return said


def test_stored_bitmaps_are_shown_as_qemu_nbd_does(serve: Serve, tmp_path: Path) -> None:
    image = make_chain(tmp_path)
    # qemu-nbd numbers them from the last to the first
    with stock(tmp_path, image, "-r", "-A", *(f"-B{name}" for name in reversed(NAMES))) as uri:
        expected = seen(uri, str(tmp_path / "stock.sock"))
    before = image.read_bytes()
    with serve(image, "qcow2", "-r", "-A", *(f"-B{name}" for name in NAMES)) as server:
        assert seen(server.uri(), server.address) == expected
    assert image.read_bytes() == before
    assert sum(extent["length"] for extent in expected[1] if extent["type"] == 1) > 0  # type: ignore[attr-defined]
