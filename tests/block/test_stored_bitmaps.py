"""Stored bitmaps of a chain: the nearest counts, and an image that would lose its own is not opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.block.graph import image_roots
from nbdserve.block.spec import ImageSpec
from nbdserve.block.stored_bitmaps import open_with_bitmaps
from nbdserve.errors import ConfigError
from nbdserve.units import KIB, MIB
from tests.support.images import needs_qemu, qemu_io, run

pytestmark = needs_qemu


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``both`` is in both images, ``below`` in the base, ``above`` in the top, which is larger."""
    folder = tmp_path_factory.mktemp("chain")
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    for name in ("both", "below"):
        run("qemu-img", "bitmap", "--add", base, name)
    qemu_io(base, "qcow2", ["write 0 64k"])
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "2M")
    for name in ("both", "above"):
        run("qemu-img", "bitmap", "--add", top, name)
    qemu_io(top, "qcow2", ["write 1M 128k"])
    return top


@pytest.mark.parametrize("fields", [{"read_only": True}, {"overlay": True}])
async def test_the_nearest_of_a_name_is_shown(chain: Path, fields: dict[str, bool]) -> None:
    spec = ImageSpec(str(chain), "qcow2", **fields)  # type: ignore[arg-type]
    node, bitmaps = await open_with_bitmaps(spec, image_roots(spec.path), ["below", "both", "above"])
    assert [bitmap.name for bitmap in bitmaps] == ["below", "both", "above"]
    assert [bitmap.size for bitmap in bitmaps] == [MIB, 2 * MIB, 2 * MIB]
    assert [bitmap.count() for bitmap in bitmaps] == [64 * KIB, 128 * KIB, 128 * KIB]
    await node.close()


async def test_one_of_an_image_to_be_written_is_refused_and_still_there_afterwards(chain: Path) -> None:
    before = chain.read_bytes()
    spec = ImageSpec(str(chain), "qcow2")
    for name, problem in (("above", "serve it read-only"), ("none", "^Bitmap 'none' is not found$")):
        with pytest.raises(ConfigError, match=problem):
            await open_with_bitmaps(spec, image_roots(spec.path), ["below", name])
    assert chain.read_bytes() == before


async def test_one_below_an_image_to_be_written_is_shown(tmp_path: Path, chain: Path) -> None:
    top = tmp_path / "over.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", chain, "-F", "qcow2", top)
    spec = ImageSpec(str(top), "qcow2")
    node, (bitmap,) = await open_with_bitmaps(spec, image_roots(spec.path, [chain.parent]), ["above"])
    assert not node.read_only
    assert bitmap.count() == 128 * KIB
    await node.close()


async def test_an_inconsistent_one_is_refused(tmp_path: Path, chain: Path) -> None:
    content = bytearray(chain.read_bytes())
    at = content.index(b"\x23\x85\x28\x75") + 8
    entry = int.from_bytes(content[at + 16 : at + 24], "big")
    content[entry + 12 : entry + 16] = (3).to_bytes(4, "big")
    damaged = tmp_path / "top.qcow2"
    damaged.write_bytes(content)
    spec = ImageSpec(str(damaged), "qcow2", read_only=True)
    with pytest.raises(ConfigError, match="Bitmap 'both' is inconsistent and cannot be used"):
        await open_with_bitmaps(spec, image_roots(spec.path, [chain.parent]), ["both"])
