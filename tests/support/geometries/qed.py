"""QED: cluster and table sizes from the smallest QEMU opens to those of one slice among many, with and without a base.

QEMU takes tables of one cluster for bad, and overflows in its limits from 8 MiB clusters on: those are ours alone.
Over a backing file it must not zero: when it writes a part of a zero cluster, it fills the rest from that file.
"""

from __future__ import annotations

from nbdserve.units import KIB, MIB
from tests.support.geometries.geometry import Field, Geometry, Kit

_SMALL = (
    Geometry("qed-4k", 2 * MIB, "qed", options="cluster_size=4k,table_size=2"),
    Geometry("qed-4k-ts1", 2 * MIB, "qed", options="cluster_size=4k,table_size=1", maker="ours", stock=""),
    Geometry("qed-4k-ts16", 2 * MIB + 512, "qed", options="cluster_size=4k,table_size=16", own=True),
    Geometry("qed-tiny", 512, "qed", options="cluster_size=4k,table_size=2"),
    Geometry("qed-ours", 3 * MIB, "qed", options="cluster_size=8k,table_size=2", maker="ours", own=True, fill="ours"),
    Geometry(
        "qed-4k-backing",
        6 * MIB,
        "qed",
        options="cluster_size=4k,table_size=2",
        base="raw",
        base_size=1 * MIB + 512,
        stock_zeroes=False,
        own=True,
        fill="stock",
    ),
    Geometry("qed-64k-backing", 2 * MIB, "qed", base="qcow2", base_size=3 * MIB, stock_zeroes=False),
    Geometry("qed-64k", 4 * MIB, "qed", own=True),
)
_MORE = (
    Geometry("qed-64k-ts16", 24 * MIB, "qed", options="table_size=16", own=True),
    Geometry(
        "qed-1m-backing",
        24 * MIB,
        "qed",
        options="cluster_size=1M,table_size=2",
        base="raw",
        base_size=10 * MIB,
        stock_zeroes=False,
    ),
    Geometry("qed-4m", 40 * MIB, "qed", options="cluster_size=4M,table_size=2", own=True),
    Geometry("qed-on-qed", 6 * MIB, "qed", base="qed", base_size=9 * MIB, own=True, fill="stock", stock_zeroes=False),
)
_FIELDS = (
    Field("magic", 0, 4),
    Field("cluster_size", 4, 4),
    Field("table_size", 8, 4),
    Field("header_size", 12, 4),
    Field("features", 16, 8),
    Field("compat_features", 24, 8),
    Field("autoclear_features", 32, 8),
    Field("l1_table_offset", 40, 8),
    Field("image_size", 48, 8),
    Field("backing_filename_offset", 56, 4),
    Field("backing_filename_size", 60, 4),
    Field("first L1 entry of 4 KiB clusters", 4 * KIB, 8),
    Field("second L1 entry of 4 KiB clusters", 4 * KIB + 8, 8),
    Field("first L1 entry of 64 KiB clusters", 64 * KIB, 8),
)
"""docs/interop/qed_spec.rst, "Header"."""

KIT = Kit("qed", _SMALL, _MORE, stock_check=True, fields=_FIELDS)
