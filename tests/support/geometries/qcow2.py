"""qcow2: cluster sizes, widths of counts, versions, extended entries, data files, backing files, snapshots."""

from __future__ import annotations

from nbdserve.units import KIB, MIB
from tests.support.geometries.geometry import Field, Geometry, Kit

_SMALL = (
    Geometry("512", 512 * KIB, "qcow2", options="cluster_size=512"),
    Geometry("512-rb64", 1 * MIB, "qcow2", options="cluster_size=512,refcount_bits=64"),
    Geometry("512-rb1", 768 * KIB, "qcow2", options="cluster_size=512,refcount_bits=1"),
    Geometry("512-backing", 512 * KIB, "qcow2", options="cluster_size=512", base="raw", base_size=384 * KIB),
    Geometry("512-snapshot", 512 * KIB, "qcow2", options="cluster_size=512", own=True, snapshot=True),
    Geometry(
        "512-rb64-snapshot", 768 * KIB, "qcow2", options="cluster_size=512,refcount_bits=64", own=True, snapshot=True
    ),
    Geometry(
        "512-rb64-full",
        1792 * KIB,
        "qcow2",
        options="cluster_size=512,refcount_bits=64,preallocation=metadata",
        snapshot=True,
    ),
    Geometry("1k-compressed", 1 * MIB, "qcow2", options="cluster_size=1024", own=True, compressed=True),
    Geometry("4k", 2 * MIB, "qcow2", options="cluster_size=4k"),
    Geometry("4k-rb1", 2 * MIB, "qcow2", options="cluster_size=4k,refcount_bits=1"),
    Geometry("4k-rb64", 2 * MIB, "qcow2", options="cluster_size=4k,refcount_bits=64"),
    Geometry("4k-v2", 2 * MIB, "qcow2", options="cluster_size=4k,compat=0.10", own=True),
    Geometry("4k-backing", 2 * MIB, "qcow2", options="cluster_size=4k", base="qcow2", base_size=1 * MIB, own=True),
    Geometry(
        "4k-v2-backing",
        2 * MIB,
        "qcow2",
        options="cluster_size=4k,compat=0.10",
        base="raw",
        base_size=1 * MIB,
        own=True,
    ),
    Geometry("4k-snapshot", 2 * MIB, "qcow2", options="cluster_size=4k", own=True, snapshot=True),
    Geometry("4k-compressed", 2 * MIB, "qcow2", options="cluster_size=4k", own=True, compressed=True),
    Geometry("512-data", 512 * KIB, "qcow2", options="cluster_size=512,data_file=image.data"),
    Geometry("4k-data", 2 * MIB, "qcow2", options="cluster_size=4k,data_file=image.data", own=True, fill="stock"),
    Geometry("4k-data-raw", 2 * MIB, "qcow2", options="cluster_size=4k,data_file=image.data,data_file_raw=on"),
    Geometry("64k", 4 * MIB, "qcow2", options="cluster_size=64k"),
    Geometry("64k-backing", 4 * MIB, "qcow2", options="cluster_size=64k", base="raw", base_size=5 * MIB),
    Geometry("16k-ext", 2 * MIB, "qcow2", options="cluster_size=16k,extended_l2=on"),
    Geometry(
        "16k-ext-backing", 2 * MIB, "qcow2", options="cluster_size=16k,extended_l2=on", base="qcow2", base_size=1 * MIB
    ),
    Geometry("64k-ext-snapshot", 4 * MIB, "qcow2", options="cluster_size=64k,extended_l2=on", own=True, snapshot=True),
    Geometry(
        "64k-ext-data",
        4 * MIB,
        "qcow2",
        options="cluster_size=64k,extended_l2=on,data_file=image.data",
        own=True,
        fill="stock",
    ),
)

_LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
_AES = "encrypt.format=aes,encrypt.key-secret=s"
_ENCRYPTED = (
    Geometry("4k-luks", 2 * MIB, "qcow2", f"{_LUKS},cluster_size=4k", encryption="luks", secret=b"a passphrase"),
    Geometry(
        "16k-ext-luks-backing",
        2 * MIB,
        "qcow2",
        f"{_LUKS},cluster_size=16k,extended_l2=on",
        base="raw",
        base_size=1 * MIB,
        encryption="luks",
        secret=b"a passphrase",
    ),
    Geometry(
        "512-aes", 512 * KIB, "qcow2", f"{_AES},cluster_size=512", own=True, encryption="aes", secret=b"a passphrase"
    ),
    Geometry(
        "16k-ext-aes",
        2 * MIB,
        "qcow2",
        f"{_AES},cluster_size=16k,extended_l2=on",
        encryption="aes",
        secret=b"a passphrase",
    ),
)

_MORE = (
    Geometry("2m", 24 * MIB, "qcow2", options="cluster_size=2M"),
    Geometry("2m-backing", 24 * MIB, "qcow2", options="cluster_size=2M", base="raw", base_size=10 * MIB, own=True),
    Geometry(
        "2m-ext-backing", 24 * MIB, "qcow2", options="cluster_size=2M,extended_l2=on", base="qcow2", base_size=30 * MIB
    ),
    Geometry("64k-long-base", 6 * MIB, "qcow2", options="cluster_size=64k", base="qcow2", base_size=9 * MIB, own=True),
    Geometry("64k-short-base", 6 * MIB, "qcow2", options="cluster_size=64k", base="raw", base_size=3 * MIB + 512),
    Geometry(
        "64k-compressed-base",
        6 * MIB,
        "qcow2",
        options="cluster_size=64k",
        base="qcow2",
        base_size=5 * MIB,
        base_options="cluster_size=64k",
        compressed=True,
    ),
    Geometry("64k-zstd", 6 * MIB, "qcow2", options="cluster_size=64k,compression_type=zstd", own=True, compressed=True),
    Geometry(
        "64k-ext-compressed", 6 * MIB, "qcow2", options="cluster_size=64k,extended_l2=on", own=True, compressed=True
    ),
    Geometry("64k-odd", 5 * MIB + 512, "qcow2", options="cluster_size=64k", base="raw", base_size=5 * MIB + 512 * 3),
    Geometry(
        "64k-data-raw",
        6 * MIB,
        "qcow2",
        options="cluster_size=64k,data_file=image.data,data_file_raw=on",
        own=True,
        fill="stock",
    ),
    Geometry("32k-rb2", 6 * MIB, "qcow2", options="cluster_size=32k,refcount_bits=2", own=True, snapshot=True),
)

_FIELDS = (
    Field("magic", 0, 4, "big"),
    Field("version", 4, 4, "big"),
    Field("backing_file_offset", 8, 8, "big"),
    Field("backing_file_size", 16, 4, "big"),
    Field("cluster_bits", 20, 4, "big"),
    Field("size", 24, 8, "big"),
    Field("crypt_method", 32, 4, "big"),
    Field("l1_size", 36, 4, "big"),
    Field("l1_table_offset", 40, 8, "big"),
    Field("refcount_table_offset", 48, 8, "big"),
    Field("refcount_table_clusters", 56, 4, "big"),
    Field("nb_snapshots", 60, 4, "big"),
    Field("snapshots_offset", 64, 8, "big"),
    Field("incompatible_features", 72, 8, "big"),
    Field("compatible_features", 80, 8, "big"),
    Field("autoclear_features", 88, 8, "big"),
    Field("refcount_order", 96, 4, "big"),
    Field("header_length", 100, 4, "big"),
    Field("compression_type", 104, 1, "big"),
    Field("first extension type", 112, 4, "big"),
    Field("first extension length", 116, 4, "big"),
)
"""docs/interop/qcow2, "Header"."""

KIT = Kit("qcow2", _SMALL + _ENCRYPTED, _MORE, stock_check=True, fields=_FIELDS)
