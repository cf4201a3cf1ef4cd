"""qcow, version 1: the two shapes qemu-img makes, compressed content, and the header's other figures."""

from __future__ import annotations

from pathlib import Path

from nbdserve.units import MIB
from tests.support import images
from tests.support.geometries.geometry import Field, Geometry, Kit


def _compress(source: Path, target: Path) -> None:
    """qemu-img convert -c; it is known to end with 1 and no message although the image is right."""
    images.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow", source, target, codes=(0, 1))


_SMALL = (
    Geometry("qcow", 2 * MIB, "qcow"),
    Geometry("qcow-own", 5 * MIB + 512, "qcow", own=True),
    Geometry("qcow-tiny", 512, "qcow"),
    Geometry("qcow-ours", 3 * MIB, "qcow", maker="ours", own=True, fill="ours"),
    Geometry("qcow-backing", 5 * MIB, "qcow", base="raw", base_size=1 * MIB + 512, own=True, fill="stock"),
    Geometry("qcow-long-base", 1 * MIB, "qcow", base="qcow2", base_size=2 * MIB),
    Geometry("qcow-compressed", 2 * MIB, "qcow", own=True, make_from=_compress),
)
_MORE = (Geometry("qcow-on-qcow", 5 * MIB, "qcow", base="qcow", base_size=6 * MIB, own=True, fill="stock"),)
_FIELDS = (
    Field("magic", 0, 4, "big"),
    Field("version", 4, 4, "big"),
    Field("backing_file_offset", 8, 8, "big"),
    Field("backing_file_size", 16, 4, "big"),
    Field("mtime", 20, 4, "big"),
    Field("size", 24, 8, "big"),
    Field("cluster_bits", 32, 1, "big"),
    Field("l2_bits", 33, 1, "big"),
    Field("padding", 34, 2, "big"),
    Field("crypt_method", 36, 4, "big"),
    Field("l1_table_offset", 40, 8, "big"),
    Field("first L1 entry", 48, 8, "big"),
    Field("second L1 entry", 56, 8, "big"),
)

KIT = Kit("qcow", _SMALL, _MORE, fields=_FIELDS)
