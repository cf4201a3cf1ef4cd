"""Images on an NBD server: what the user may name, and what a header may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.block.graph import image_roots, open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.storage.nbd_target import NbdTarget
from nbdserve.units import KIB, MIB
from tests.server.clients import raw, serving


def spec_of(socket: str, fmt: str, **more: object) -> ImageSpec:
    target = NbdTarget("a", socket=socket)
    return ImageSpec(target.uri, fmt, nbd=target, **more)  # type: ignore[arg-type]


async def qcow2(**options: str) -> MemoryStorage:
    """A qcow2 image in a disk with room for it to grow."""
    disk = MemoryStorage(size=8 * MIB)
    await Qcow2Driver.create(disk, MIB, options)
    await disk.truncate(8 * MIB)
    return disk


async def test_a_qcow2_on_another_server_is_read_and_written(tmp_path: Path) -> None:
    disk = await qcow2()
    async with serving(tmp_path, raw(disk)) as served:
        for fmt in ("qcow2", None):
            node = await open_image(spec_of(served.path, fmt))  # type: ignore[arg-type]
            assert node.size == MIB
            await node.write(100 * KIB, b"hello")
            await node.flush()
            assert await node.read(100 * KIB, 6) == b"hello\0"
            await node.close()
        node = await open_image(ImageSpec("", "raw", offset=100 * KIB, size=5, file=spec_of(served.path, "qcow2")))
        assert await node.read(0, 5) == b"hello"
        await node.close()


async def test_an_overlay_over_another_server(tmp_path: Path) -> None:
    async with serving(tmp_path, raw(MemoryStorage(b"base", size=MIB), read_only=True)) as served:
        node = await open_image(spec_of(served.path, "raw", overlay=True))
        await node.write(1, b"u")
        assert await node.read(0, 4) == b"buse"
        await node.close()


@pytest.mark.parametrize("name", ["base", "./base", "nbd://127.0.0.1:1/x", "nbd:unix:/run/s", "nbd+unix:///?socket=/s"])
async def test_a_header_reaches_no_server_and_no_file_beside_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with the working directory as a root: the image does not lie in it."""
    (tmp_path / "base").write_bytes(bytes(MIB))
    monkeypatch.chdir(tmp_path)
    async with serving(tmp_path, raw(await qcow2(backing_file=name, backing_fmt="raw"))) as served:
        spec = spec_of(served.path, "qcow2")
        for roots in (None, image_roots(spec.path, [tmp_path])):
            with pytest.raises(ImageError) as error:
                await open_image(spec, roots)
            assert spec.path in str(error.value)
            assert repr(name) in str(error.value)


async def test_a_header_may_name_a_file_under_a_root(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"base" + bytes(MIB))
    async with serving(tmp_path, raw(await qcow2(backing_file=str(base), backing_fmt="raw"))) as served:
        spec = spec_of(served.path, "qcow2", read_only=True)
        with pytest.raises(ImageError, match="outside the image roots"):
            await open_image(spec)
        node = await open_image(spec, image_roots(spec.path, [tmp_path]))
        assert await node.read(0, 5) == b"base\0"
        await node.close()
