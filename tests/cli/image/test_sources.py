from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.sources import opened, source_spec
from nbdserve.errors import ConfigError, ImageError


def test_a_source_is_read_only() -> None:
    spec = source_spec("a.img", ImageSpec("", "qcow2"), secrets={}, snapshot="snapshot.id=3")
    assert (spec.path, spec.format, spec.read_only, spec.snapshot) == ("a.img", "qcow2", True, "3")
    spec = source_spec("driver=vdi,file.filename=a.vdi", ImageSpec(""), image_opts=True, secrets={})
    assert (spec.path, spec.format, spec.read_only, spec.snapshot) == ("a.vdi", "vdi", True, None)


async def test_several_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 512)
    specs = [ImageSpec(str(tmp_path / name), "raw", read_only=True) for name in ("a", "b")]
    async with opened(specs) as nodes:
        assert [bytes(await node.read(0, 1)) for node in nodes] == [b"a", b"b"]
    with pytest.raises(ImageError):
        async with opened([*specs, ImageSpec(str(tmp_path / "absent"), "raw", read_only=True)]):
            pass


@contextlib.contextmanager
def standard_input(monkeypatch: pytest.MonkeyPatch, fd: int) -> Iterator[None]:
    with open(fd) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield


@pytest.mark.parametrize("kind", ["pipe", "file"])
async def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    content = b"piped" * 1000
    if kind == "file":
        (tmp_path / "file").write_bytes(content)
        fd = os.open(tmp_path / "file", os.O_RDONLY)
    else:
        fd, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
    with standard_input(monkeypatch, fd):
        async with opened([ImageSpec("-", read_only=True)]) as [node]:
            assert bytes(await node.read(0, node.size)) == content
    with pytest.raises(ConfigError, match="standard input is read from its beginning"):
        async with opened([ImageSpec("-", "qcow2", read_only=True)]):
            pass


async def test_standard_input_that_does_not_come_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with standard_input(monkeypatch, reader):
        waiting = asyncio.ensure_future(_enter(ImageSpec("-", read_only=True)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    os.close(writer)


async def _enter(spec: ImageSpec) -> None:
    async with opened([spec]):
        pass
