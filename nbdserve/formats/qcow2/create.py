"""Making qcow2 images: where everything goes (``plan_layout``, pure), what the options mean, and the writing.

Source: the qcow2 specification (docs/interop/qcow2), "Header", "Host cluster management".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.formats.create_options import parse_boolean
from nbdserve.formats.luks.options import VOLUME_OPTIONS
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.refcounts import encode_counts
from nbdserve.formats.reserve import reserve
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil, is_power_of_two, parse_size

if TYPE_CHECKING:
    from nbdserve.formats.luks.create import VolumeOptions

FEATURE_NAMES_MIN_CLUSTER_BITS: Final = 13
"""In clusters under 8 KiB the feature name table would take the room of the backing file name; QEMU omits it there."""
CHUNK_ENTRIES: Final = 1 << 18
"""Table entries made and written at a time: 2 MiB of L2 entries."""

CREATE_OPTIONS: Final = (
    CreateOption("backing_file", "File name of a base image"),
    CreateOption("backing_fmt", "Image format of the base image"),
    CreateOption("cluster_size", "qcow2 cluster size", "65536"),
    CreateOption("compat", "Compatibility level (v2 [0.10] or v3 [1.1])", "1.1"),
    CreateOption("compression_type", "Compression method used for image cluster compression (zlib, zstd)", "zlib"),
    CreateOption("data_file", "File name of an external data file"),
    CreateOption("data_file_raw", "The external data file must stay valid as a raw image", "off"),
    CreateOption("encrypt.format", "Encrypt the image, format choices: 'luks'"),
    *(replace(option, name=f"encrypt.{option.name}", default="") for option in VOLUME_OPTIONS),
    CreateOption("encryption", "Encrypt the image with format 'aes' (only off: use encrypt.format=luks)", "off"),
    CreateOption("extended_l2", "Extended L2 tables", "off"),
    CreateOption("lazy_refcounts", "Postpone refcount updates", "off"),
    CreateOption("nocow", "Turn off copy-on-write (valid only on btrfs)", "off"),
    CreateOption("preallocation", "Preallocation mode (allowed values: off, metadata, falloc, full)", "off"),
    CreateOption("refcount_bits", "Width of a reference count entry in bits", "16"),
    CreateOption("size", "Virtual disk size"),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of an image are: host offsets in bytes, each part cluster-aligned, one behind the other."""

    cluster_bits: int
    refcount_order: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_blocks_offset: int
    refcount_blocks: int
    """One cluster each, contiguous."""
    l1_offset: int
    """0 when there is no L1 table (a disk of 0 bytes)."""
    l1_entries: int
    luks_offset: int
    luks_length: int
    """Bytes of the LUKS header with its key material; 0 without."""
    l2_offset: int
    l2_tables: int
    """One cluster each, contiguous; 0 without preallocation."""
    data_offset: int
    data_clusters: int
    """Preallocated data clusters in this file; 0 without preallocation and with an external data file."""

    @property
    def counts_per_block(self) -> int:
        """Clusters one refcount block counts."""
        return (8 << self.cluster_bits) >> self.refcount_order

    @property
    def end_offset(self) -> int:
        """The end of the image in bytes; every cluster below is in use exactly once."""
        return self.data_offset + (self.data_clusters << self.cluster_bits)

    @property
    def clusters(self) -> int:
        """Clusters in use."""
        return self.end_offset >> self.cluster_bits


def plan_layout(
    size: int,
    *,
    cluster_bits: int,
    refcount_order: int = 4,
    extended_l2: bool = False,
    preallocate: bool = False,
    external_data: bool = False,
    luks_length: int = 0,
) -> Layout:
    """Places header, refcount table, refcount blocks, L1, LUKS and, preallocated, L2 tables and data clusters.

    The refcount structure counts itself: its size is the fixpoint of *blocks needed for all clusters, these blocks
    included*. It is reached in a few steps, because a block of c bytes counts at least c / 8 clusters.
    ConfigError when the disk is larger than the format can address at this cluster size.
    """
    cluster = 1 << cluster_bits
    l2_entries = cluster // (16 if extended_l2 else 8)
    guest_clusters = div_ceil(size, cluster)
    l1_entries = div_ceil(guest_clusters, l2_entries)
    if l1_entries * 8 > layout.MAX_L1_BYTES:
        raise ConfigError(
            f"a disk of {size} bytes needs an L1 table of {l1_entries * 8} bytes, "
            f"qcow2 has at most {layout.MAX_L1_BYTES}: use a larger cluster_size"
        )
    l1_clusters = div_ceil(l1_entries * 8, cluster)
    luks_clusters = div_ceil(luks_length, cluster)
    l2_tables = l1_entries if preallocate else 0
    data_clusters = guest_clusters if preallocate and not external_data else 0
    counted = 1 + l1_clusters + luks_clusters + l2_tables + data_clusters
    counts_per_block = cluster * 8 >> refcount_order
    blocks, table_clusters = 0, 0
    while True:
        needed = max(1, div_ceil(counted + blocks + table_clusters, counts_per_block))
        needed_table = div_ceil(needed * 8, cluster)
        if (needed, needed_table) == (blocks, table_clusters):
            break
        blocks, table_clusters = needed, needed_table
    if table_clusters * cluster > layout.MAX_REFCOUNT_TABLE_BYTES:
        raise ConfigError(
            f"preallocating {size} bytes needs a refcount table of {table_clusters * cluster} bytes, qcow2 has at most "
            f"{layout.MAX_REFCOUNT_TABLE_BYTES}: use a larger cluster_size or fewer refcount_bits"
        )
    blocks_offset = (1 + table_clusters) * cluster
    l1_offset = blocks_offset + blocks * cluster
    luks_offset = l1_offset + l1_clusters * cluster
    l2_offset = luks_offset + luks_clusters * cluster
    return Layout(
        cluster_bits=cluster_bits,
        refcount_order=refcount_order,
        refcount_table_offset=cluster,
        refcount_table_clusters=table_clusters,
        refcount_blocks_offset=blocks_offset,
        refcount_blocks=blocks,
        l1_offset=l1_offset if l1_entries else 0,
        l1_entries=l1_entries,
        luks_offset=luks_offset,
        luks_length=luks_length,
        l2_offset=l2_offset,
        l2_tables=l2_tables,
        data_offset=l2_offset + l2_tables * cluster,
        data_clusters=data_clusters,
    )


@dataclass(frozen=True, slots=True)
class Options:
    """The creation options, checked: what ``-o`` may say, in terms of the format."""

    version: int
    cluster_bits: int
    refcount_order: int
    lazy_refcounts: bool
    extended_l2: bool
    backing_file: str | None
    backing_format: str | None
    data_file: str | None
    data_file_raw: bool
    compression_type: int
    preallocation: str
    """``off``, ``metadata``, ``falloc`` or ``full``."""
    encryption: VolumeOptions | None = None
    """LUKS."""


VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


def _choice(options: Mapping[str, str], name: str, default: str, choices: Mapping[str, Any] | tuple[str, ...]) -> str:
    value = options.get(name, default)
    if value not in choices:
        raise ConfigError(f"{name}={value}: expects one of {', '.join(choices)}")
    return value


def parse_options(options: Mapping[str, str]) -> Options:
    """The options as after ``-o``, checked against each other with qemu-img's rules; ConfigError names a bad one.

    ``size`` is the caller's; ``nocow`` acts on the file before it is opened, so it has no effect here.
    """
    known = {option.name for option in CREATE_OPTIONS}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown qcow2 option {name!r}: `-o help` lists the options there are")
    version = VERSIONS[_choice(options, "compat", "1.1", VERSIONS)]
    try:
        cluster_size = parse_size(options.get("cluster_size", "65536"))
    except ValueError as error:
        raise ConfigError(f"cluster_size: {error}") from None
    if not is_power_of_two(cluster_size) or not 512 <= cluster_size <= 2 << 20:
        raise ConfigError(f"cluster_size={cluster_size}: must be a power of two between 512 and 2048k")
    bits = options.get("refcount_bits", "16")
    if bits not in {"1", "2", "4", "8", "16", "32", "64"}:
        raise ConfigError(f"refcount_bits={bits}: must be a power of two and may not exceed 64")
    parsed = Options(
        version=version,
        cluster_bits=cluster_size.bit_length() - 1,
        refcount_order=int(bits).bit_length() - 1,
        lazy_refcounts=parse_boolean(options, "lazy_refcounts"),
        extended_l2=parse_boolean(options, "extended_l2"),
        backing_file=options.get("backing_file") or None,
        backing_format=options.get("backing_fmt") or None,
        data_file=options.get("data_file") or None,
        data_file_raw=parse_boolean(options, "data_file_raw"),
        compression_type=("zlib", "zstd").index(_choice(options, "compression_type", "zlib", ("zlib", "zstd"))),
        preallocation=_choice(options, "preallocation", "off", ("off", "metadata", "falloc", "full")),
        encryption=parse_encryption(options),
    )
    parse_boolean(options, "nocow")
    _check_together(parsed)
    return parsed


def parse_encryption(options: Mapping[str, str]) -> VolumeOptions | None:
    """The options ``encrypt.*``; None where nothing is to be encrypted. ConfigError for a bad one."""
    prefix = "encrypt."
    chosen = {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}
    if parse_boolean(options, "encryption") or chosen.get("format") == "aes":
        raise ConfigError("new images are not encrypted with 'aes', which is insecure: use encrypt.format=luks")
    if not chosen:
        return None
    if chosen.pop("format", None) != "luks":
        raise ConfigError("encrypted images need encrypt.format=luks")
    from nbdserve.formats.luks.create import parse_volume_options  # noqa: PLC0415  (few images are encrypted)

    try:
        return parse_volume_options(chosen)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _check_together(options: Options) -> None:
    """What qcow2, or QEMU, refuses in combination. ConfigError."""
    if options.version < 3:
        for used, what in (
            (options.refcount_order != 4, "refcount_bits other than 16"),
            (options.lazy_refcounts, "lazy_refcounts=on"),
            (options.extended_l2, "extended_l2=on"),
            (options.data_file is not None, "data_file"),
            (options.compression_type != 0, "a compression_type other than zlib"),
            (options.encryption is not None and options.preallocation != "off", "preallocation of an encrypted image"),
        ):
            if used:
                raise ConfigError(f"{what} needs compat=1.1 (v3)")
    if options.extended_l2 and options.cluster_bits < 14:
        raise ConfigError("extended_l2=on needs a cluster_size of at least 16384")
    if options.data_file_raw and options.data_file is None:
        raise ConfigError("data_file_raw=on needs data_file")
    if options.data_file_raw and options.encryption is not None:
        raise ConfigError("data_file_raw=on and encryption exclude each other")
    if options.backing_file is None:
        if options.backing_format is not None:
            raise ConfigError("backing_fmt needs backing_file")
        return
    if options.backing_format is None:
        raise ConfigError("backing_file needs backing_fmt: a backing format is never guessed")
    if options.data_file_raw:
        raise ConfigError("backing_file and data_file_raw=on exclude each other")
    if options.preallocation != "off" and not options.extended_l2:
        raise ConfigError("backing_file and preallocation exclude each other unless extended_l2=on")


def virtual_size(size: int) -> int:
    """The size the header gets: whole sectors, as QEMU rounds."""
    return align_up(size, SECTOR_SIZE)


def plan_image(size: int, options: Mapping[str, str]) -> tuple[Options, Layout, bytes]:
    """What ``create_qcow2`` would write: the options checked, the places, the header's bytes. ConfigError; no I/O."""
    parsed = parse_options(options)
    size = virtual_size(size)
    plan = plan_layout(
        size,
        cluster_bits=parsed.cluster_bits,
        refcount_order=parsed.refcount_order,
        extended_l2=parsed.extended_l2,
        preallocate=parsed.preallocation != "off" or parsed.data_file_raw,
        external_data=parsed.data_file is not None,
        luks_length=0 if parsed.encryption is None else parsed.encryption.header_length,
    )
    try:
        return parsed, plan, make_header(plan, size, parsed).build()
    except ValueError as error:
        raise ConfigError(str(error)) from None


async def create_qcow2(
    storage: Storage,
    size: int,
    options: Mapping[str, str],
    *,
    data_file_storage: Storage | None = None,
    secret: bytes | None = None,
) -> None:
    """Make ``storage`` an empty qcow2 image of ``size`` bytes (rounded up to whole sectors).

    ``data_file_storage`` is the file of the option ``data_file``; both storages lose what they held. The header is
    written last and behind a barrier: at every moment before, the file is not a qcow2 image; from then on it is a
    complete one. ConfigError for options that cannot be, before anything is touched.
    """
    parsed, plan, header = plan_image(size, options)
    if (parsed.data_file is None) != (data_file_storage is None):
        raise ConfigError("data_file: the option and the opened file go together")
    if secret is not None and parsed.encryption is None:
        raise ConfigError("a secret is given, and the image is not to be encrypted")
    external_data = data_file_storage is not None
    volume: Sequence[tuple[int, bytes]] = ()
    if parsed.encryption is not None:
        from nbdserve.formats.luks.create import new_volume, passphrase  # noqa: PLC0415  (few images are encrypted)

        _, volume = await new_volume(parsed.encryption, passphrase(secret))
    size = virtual_size(size)
    await _empty(storage, plan.end_offset)
    await _write_refcounts(storage, plan)
    await storage.write_all([(plan.luks_offset + offset, data) for offset, data in volume])
    if plan.l2_tables:
        await _write_tables(storage, plan, size, parsed, external_data=external_data)
    if data_file_storage is not None:
        await _empty(data_file_storage, size)
        await reserve(data_file_storage, 0, size, parsed.preallocation)
        await data_file_storage.flush()
    else:
        await reserve(storage, plan.data_offset, plan.end_offset - plan.data_offset, parsed.preallocation)
    await storage.flush()
    # Only a complete image gets its header: a crash before this leaves a file that nobody takes for qcow2.
    await storage.write(0, header)
    await storage.flush()


def make_header(plan: Layout, size: int, options: Options) -> Header:
    """The header of a new image, with the extensions QEMU gives it, in QEMU's order."""
    extensions: list[tuple[int, bytes]] = []
    if options.backing_format is not None:
        extensions.append((layout.EXTENSION_BACKING_FORMAT, options.backing_format.encode()))
    if options.data_file is not None:
        extensions.append((layout.EXTENSION_DATA_FILE, os.fsencode(options.data_file)))
    if options.encryption is not None:
        area = layout.LUKS_EXTENSION.build({"offset": plan.luks_offset, "length": plan.luks_length})
        extensions.append((layout.EXTENSION_LUKS, area))
    if options.version >= 3 and plan.cluster_bits >= FEATURE_NAMES_MIN_CLUSTER_BITS:
        extensions.append((layout.EXTENSION_FEATURE_NAMES, layout.feature_name_table()))
    incompatible = (
        layout.INCOMPATIBLE_DATA_FILE * (options.data_file is not None)
        | layout.INCOMPATIBLE_COMPRESSION * (options.compression_type != layout.COMPRESSION_ZLIB)
        | layout.INCOMPATIBLE_EXTENDED_L2 * options.extended_l2
    )
    return Header(
        version=options.version,
        cluster_bits=plan.cluster_bits,
        size=size,
        l1_offset=plan.l1_offset,
        l1_entries=plan.l1_entries,
        refcount_table_offset=plan.refcount_table_offset,
        refcount_table_clusters=plan.refcount_table_clusters,
        incompatible=incompatible,
        compatible=layout.COMPATIBLE_LAZY_REFCOUNTS * options.lazy_refcounts,
        autoclear=layout.AUTOCLEAR_DATA_FILE_RAW * options.data_file_raw,
        refcount_order=plan.refcount_order,
        crypt_method=layout.CRYPT_NONE if options.encryption is None else layout.CRYPT_LUKS,
        compression_type=options.compression_type,
        backing_name=options.backing_file,
        extensions=tuple(extensions),
    )


async def _empty(storage: Storage, size: int) -> None:
    """``size`` bytes of zeroes."""
    await storage.truncate(0)
    await storage.truncate(size)
    if not storage.grows_zeroed:
        await storage.zero(0, size)


async def _write_refcounts(storage: Storage, plan: Layout) -> None:
    """The refcount table, and 1 for every cluster below the end: all that the image has is used once."""
    cluster = 1 << plan.cluster_bits
    table = plan.refcount_blocks_offset + np.arange(plan.refcount_blocks, dtype=">u8") * cluster
    await storage.write(plan.refcount_table_offset, table.astype(">u8").tobytes())
    for first in range(0, plan.clusters, CHUNK_ENTRIES):
        counts = np.zeros(CHUNK_ENTRIES, np.uint8)
        counts[: plan.clusters - first] = 1
        offset = plan.refcount_blocks_offset + (first << plan.refcount_order >> 3)
        length = min(CHUNK_ENTRIES, plan.refcount_blocks * plan.counts_per_block - first)
        await storage.write(offset, encode_counts(counts[:length], plan.refcount_order))


async def _write_tables(storage: Storage, plan: Layout, size: int, options: Options, *, external_data: bool) -> None:
    """The L1 table, and L2 tables that map every cluster in order; extended entries have no subcluster allocated.

    With encryption the clusters are only reserved and read as zeroes: what they hold would be decrypted to noise.
    """
    cluster = 1 << plan.cluster_bits
    l1 = (plan.l2_offset + np.arange(plan.l1_entries, dtype=np.uint64) * cluster) | np.uint64(layout.COPIED)
    await storage.write(plan.l1_offset, l1.astype(">u8").tobytes())
    guest_clusters = div_ceil(size, cluster)
    words = 2 if options.extended_l2 else 1
    base = 0 if external_data else plan.data_offset
    flags = layout.COPIED | layout.ZERO_FLAG * (options.encryption is not None and not options.extended_l2)
    for first in range(0, guest_clusters, CHUNK_ENTRIES):
        count = min(CHUNK_ENTRIES, guest_clusters - first)
        entries = np.zeros((count, words), ">u8")
        numbers = np.arange(first, first + count, dtype=np.uint64)
        entries[:, 0] = (base + numbers * cluster) | np.uint64(flags)
        await storage.write(plan.l2_offset + first * 8 * words, entries.tobytes())
