"""The shapes an image can have, one module per format; every suite over all formats finds its images here.

How a format joins: a module ``<format>.py`` beside this file, with ``KIT``, a ``Kit`` whose geometries are

* ``geometries``: writable and small (a few MiB of file at most: crash states are copies of it), for each way the format
  has of storing things, tiny and odd sizes among them, and, where it has backing files, a longer and a shorter one;
* ``more``: writable, for the differential rounds alone: large blocks, large disks;
* ``readable``: shapes that are only read.

``Geometry`` says who makes the image, how content gets in, and what QEMU's tools can do with it; ``Kit`` what their
checker knows, which numbers the header has (the boundary sweep sets each to its extremes) and how to make checksums
right. Then these run over the format, the first four also in the test suite, in small:

* ``pytest tests/conformance/test_formats.py -k <format>``
* ``python -m tests.differential --format <format> --rounds 20 --ops 500``
* ``python -m tests.crash --format <format> --states 1500``
* ``python -m tests.property.fuzz_images --format <format> --images 500``
* ``tests/property/test_node_machine.py`` and ``test_node_faults.py``, which take the writable geometries
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from tests.support.geometries.geometry import Contents, Field, Geometry, Kit
from tests.support.geometries.making import Image, build, make, spec_of, stock_of
from tests.support.images import Stock, ToolError

__all__ = [
    "CRASH_GEOMETRIES",
    "DIFFERENTIAL_GEOMETRIES",
    "KITS",
    "Contents",
    "Field",
    "Geometry",
    "Image",
    "Kit",
    "build",
    "judge",
    "make",
    "named",
    "spec_of",
    "stock_of",
]

_SHARED = {"geometry", "making"}


def _kits() -> dict[str, Kit]:
    kits: dict[str, Kit] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if module not in _SHARED:
            kit: Kit = importlib.import_module(f"{__name__}.{module}").KIT
            assert kit.fmt not in kits, f"{module}: a second kit of {kit.fmt}"
            assert {geometry.fmt for geometry in kit.all} <= {kit.fmt}, f"{module}: a geometry of another format"
            kits[kit.fmt] = kit
    return kits


KITS = _kits()
"""By format."""
CRASH_GEOMETRIES = tuple(geometry for kit in KITS.values() for geometry in kit.geometries)
DIFFERENTIAL_GEOMETRIES = tuple(geometry for kit in KITS.values() for geometry in kit.geometries + kit.more)


def named(geometries: Sequence[Geometry], name: str) -> Geometry:
    """The one geometry called ``name``."""
    (found,) = (geometry for geometry in geometries if geometry.name == name)
    return found


def judge(geometry: Geometry, path: Path, scratch: Path, content: bytes) -> None:
    """What a crash left is ``content`` for others too, and their checker finds no worse than the format allows.

    ToolError else. A repair that the format asks for is made on the files at ``path``, and where the kit says so QEMU
    writes on there.
    """
    if not geometry.stock:
        if geometry.reader is not None and geometry.reader(path) != content:
            raise ToolError("the other reader reads other bytes than we do")
        return
    kit, stock = KITS[geometry.fmt], stock_of(geometry, path)
    if kit.stock_check:
        stock.check(codes=kit.crash_codes)
    if kit.crash_repair:
        stock.repair()
    _same(stock, scratch, content)
    if kit.crash_used:
        model = bytearray(content)
        places = range(0, len(content), kit.crash_used)
        for at in places:
            model[at : at + 512] = b"\x7b" * 512
        stock.qemu_io([f"write -P 0x7b {at} 512" for at in places])
        stock.check()
        _same(stock, scratch, bytes(model))


def _same(stock: Stock, scratch: Path, content: bytes) -> None:
    seen = stock.raw_content(scratch)
    if seen != content:
        at = next((i for i in range(0, len(content), 512) if seen[i : i + 512] != content[i : i + 512]), len(content))
        raise ToolError(f"qemu-img reads other bytes than we do, first at {at:#x}")
