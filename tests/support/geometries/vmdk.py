"""VMDK: one file or several, flat or sparse or compressed, with a parent or without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from nbdserve.units import KIB, MIB
from tests.formats.vmdk.files import cowd, described, sesparse
from tests.support import images
from tests.support.geometries.geometry import Field, Geometry, Kit


def _make_split(raw: Path, path: Path, *, sizes: tuple[int, ...], kinds: str, options: str) -> None:
    content, lines, start = raw.read_bytes(), [], 0
    for number, (size, kind) in enumerate(zip(sizes, kinds, strict=True), 1):
        part = path.with_name(f"part-{kind}{number:03d}.vmdk")
        part.write_bytes(content[start : start + size])
        start += size
        if kind == "s":
            flat = part.rename(part.with_suffix(".raw"))
            images.convert(flat, "raw", part, "vmdk", *(["-o", options] if options else []))
            flat.unlink()
            lines.append(f'RW {size // 512} SPARSE "{part.name}"')
        else:
            lines.append(f'RW {size // 512} FLAT "{part.name}" 0')
    assert start == len(content)
    described(path, "twoGbMaxExtentSparse", *lines)


def _split(sizes: tuple[int, ...], kinds: str, options: str = "") -> Callable[[Path, Path], None]:
    """A maker of an image of small extents: ``s`` a sparse one of this many bytes, ``f`` a flat one."""
    return partial(_make_split, sizes=sizes, kinds=kinds, options=options)


def _sesparse(raw: Path, path: Path) -> None:
    sesparse(path, _grains(raw, 4096))


def _cowd(raw: Path, path: Path) -> None:
    cowd(path, _grains(raw, 512))


def _grains(raw: Path, size: int) -> list[bytes | None]:
    content = raw.read_bytes()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return [piece if any(piece) else None for piece in pieces]


def _vmdk(name: str, size: int, options: str = "", **more: object) -> Geometry:
    return Geometry(f"vmdk-{name}", size, "vmdk", options, **more)  # type: ignore[arg-type]


_FIELDS = (
    ("magic", 0, 4),
    ("version", 4, 4),
    ("flags", 8, 4),
    ("capacity", 12, 8),
    ("grainSize", 20, 8),
    ("descriptorOffset", 28, 8),
    ("descriptorSize", 36, 8),
    ("numGTEsPerGT", 44, 4),
    ("rgdOffset", 48, 8),
    ("gdOffset", 56, 8),
    ("overHead", 64, 8),
    ("uncleanShutdown", 72, 1),
    ("newlines", 73, 4),
    ("compressAlgorithm", 77, 2),
    ("redundant directory entry", 0x15 * 512, 4),
    ("redundant table entry", 0x16 * 512, 4),
    ("directory entry", 0x1A * 512, 4),
    ("table entry", 0x1B * 512, 4),
)

KIT = Kit(
    "vmdk",
    geometries=(
        _vmdk("sparse", 4 * MIB),
        _vmdk("sparse-own", 4 * MIB, own=True),
        _vmdk("sparse-ours", 4 * MIB, own=True, maker="ours", fill="ours"),
        _vmdk("tiny", 512),
        _vmdk("odd", 3 * MIB + 1536, own=True),
        _vmdk("zeroed", 4 * MIB, "zeroed_grain=on", own=True),
        _vmdk("two-tables", 33 * MIB + 512, "zeroed_grain=on"),
        _vmdk("child", 4 * MIB, base="vmdk", base_size=4 * MIB, own=True, fill="stock"),
        _vmdk("child-short", 4 * MIB, base="vmdk", base_size=2 * MIB + 512),
        _vmdk("child-long", 4 * MIB, "zeroed_grain=on", base="vmdk", base_size=6 * MIB, own=True, fill="stock"),
        _vmdk(
            "child-of-stream",
            4 * MIB,
            base="vmdk",
            base_size=3 * MIB + 512,
            base_options="subformat=streamOptimized",
            own=True,
            fill="ours",
        ),
        _vmdk("flat", 2 * MIB + 512, "subformat=monolithicFlat", own=True),
        _vmdk("flat-ours", 2 * MIB, "subformat=twoGbMaxExtentFlat", own=True, maker="ours", fill="ours"),
        _vmdk("split", 3 * MIB, "subformat=twoGbMaxExtentSparse", own=True),
        _vmdk(
            "split-child",
            3 * MIB,
            "subformat=twoGbMaxExtentSparse",
            base="vmdk",
            base_size=2 * MIB,
            base_options="subformat=twoGbMaxExtentFlat",
            own=True,
            fill="stock",
        ),
        _vmdk("three", 3 * MIB + 512, own=True, make_from=_split((MIB, 192 * KIB, 1856 * KIB + 512), "sss")),
        _vmdk("three-zeroed", 3 * MIB, own=True, make_from=_split((MIB, MIB, MIB), "sss", "zeroed_grain=on")),
        _vmdk("three-flat", 3 * MIB + 512, own=True, make_from=_split((MIB + 512, 512, 2 * MIB - 512), "fff")),
        _vmdk("mixed", 4 * MIB, own=True, make_from=_split((MIB, 2 * MIB, MIB), "fsf")),
    ),
    more=(
        _vmdk("large", 300 * MIB, "zeroed_grain=on"),
        _vmdk("large-child", 100 * MIB + 512, base="vmdk", base_size=80 * MIB),
    ),
    readable=(
        _vmdk("stream", 3 * MIB + 512, "subformat=streamOptimized", own=True),
        _vmdk("sesparse", 4 * MIB, own=True, make_from=_sesparse, stock="r"),
        _vmdk("cowd", 2 * MIB, own=True, make_from=_cowd, stock="r"),
        # QEMU reads the rest of the first extent's last grain on into the second extent's range.
        _vmdk("misaligned", 3 * MIB, own=True, make_from=_split((MIB + 512, 2 * MIB - 512), "ss"), stock=""),
    ),
    stock_check=True,
    crash_codes=(0,),
    fields=tuple(Field(name, offset, size) for name, offset, size in _FIELDS),
)
