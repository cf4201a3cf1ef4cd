"""VDI images. QEMU has no differencing ones: dissect reads those."""

from __future__ import annotations

from pathlib import Path

from dissect.hypervisor.disk.vdi import VDI

from nbdserve.units import MIB
from tests.support.geometries.geometry import Field, Geometry, Kit


class _Blocks:
    """dissect's stream, read block by block: it takes a longer range to be contiguous in the file."""

    def __init__(self, path: Path, parent: _Blocks | None) -> None:
        self.vdi = VDI(path, parent=parent)  # type: ignore[arg-type]
        self.stream = self.vdi.open()

    def seek(self, offset: int) -> None:
        self.stream.seek(offset)

    def read(self, length: int) -> bytes:
        return bytes(self.stream.read(length))

    def content(self) -> bytes:
        size, block = self.vdi.size, self.vdi.block_size
        parts = []
        for offset in range(0, size, block):
            self.seek(offset)
            parts.append(self.read(min(block, size - offset)).ljust(min(block, size - offset), b"\0"))
        return b"".join(parts)


def dissected(path: Path, base: Path | None = None) -> bytes:
    """The content of an image, on its parent, as dissect reads it."""
    parent = None if base is None else _Blocks(base, None)
    image = _Blocks(path, parent)
    try:
        return image.content()
    finally:
        image.vdi.close()
        if parent is not None:
            parent.vdi.close()


def _differencing(path: Path) -> bytes:
    return dissected(path, path.parent / "base")


def _child(name: str, size: int, base_size: int, **more: bool) -> Geometry:
    return Geometry(
        name,
        size,
        "vdi",
        base="vdi",
        base_size=base_size,
        backing_by_user=True,
        maker="ours",
        fill="ours",
        stock="",
        reader=_differencing,
        **more,  # type: ignore[arg-type]
    )


KIT = Kit(
    "vdi",
    geometries=(
        Geometry("vdi-stock", 5 * MIB, "vdi"),
        Geometry("vdi-ours", 5 * MIB + 512, "vdi", maker="ours"),
        Geometry("vdi-own", 4 * MIB, "vdi", own=True),
        Geometry("vdi-tiny", 1536, "vdi", maker="ours"),
        Geometry("vdi-static", 3 * MIB, "vdi", "static=on", maker="ours"),
        _child("vdi-child", 5 * MIB, 5 * MIB, own=True),
        _child("vdi-child-longer", 4 * MIB + 512, 2 * MIB),
    ),
    more=(
        Geometry("vdi-static-stock", 9 * MIB, "vdi", "static=on", own=True),
        Geometry("vdi-40m", 40 * MIB + 1024, "vdi", own=True),
        _child("vdi-child-40m", 40 * MIB, 30 * MIB, own=True),
    ),
    stock_check=True,
    crash_used=MIB,
    fields=(
        Field("signature", 0x40, 4),
        Field("version", 0x44, 4),
        Field("header size", 0x48, 4),
        Field("image type", 0x4C, 4),
        Field("flags", 0x50, 4),
        Field("map offset", 0x154, 4),
        Field("data offset", 0x158, 4),
        Field("cylinders", 0x15C, 4),
        Field("heads", 0x160, 4),
        Field("sectors", 0x164, 4),
        Field("sector size", 0x168, 4),
        Field("size", 0x170, 8),
        Field("block size", 0x178, 4),
        Field("block extra size", 0x17C, 4),
        Field("blocks", 0x180, 4),
        Field("blocks allocated", 0x184, 4),
        Field("parent UUID", 0x1A8, 8),
        Field("parent modification UUID", 0x1B8, 8),
        Field("map entry 0", 0x200, 4),
        Field("map entry 1", 0x204, 4),
    ),
)
