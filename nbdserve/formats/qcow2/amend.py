"""Changing what ``create`` decided: version, width of refcounts, backing file, name of the data file, lazy refcounts.

Works on the file of an idle image. Every step leaves a complete image, whatever happens between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import BackingReference
from nbdserve.formats.create_options import BOOLEANS
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.backing import header_with
from nbdserve.formats.qcow2.check_analysis import read_header
from nbdserve.formats.qcow2.commit import HeaderSector
from nbdserve.formats.qcow2.create import CREATE_OPTIONS, FEATURE_NAMES_MIN_CLUSTER_BITS, VERSIONS
from nbdserve.formats.qcow2.format import AMENDABLE
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.header_change import change_header
from nbdserve.formats.qcow2.rewrite import read_state, replace_tables
from nbdserve.formats.qcow2.snapshots import NO_ICOUNT, SNAPSHOT_EXTRA, Snapshot, read_snapshots
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE

_NEWER: Final = "compatibility level 1.1 or above (use compat=1.1 or greater)"


@dataclass(frozen=True, slots=True)
class Amendment:
    """The options, in terms of the format; None: as it is."""

    version: int | None
    refcount_order: int | None
    lazy_refcounts: bool | None
    data_file: str | None
    data_file_raw: bool | None
    backing: BackingReference | None
    changes_backing: bool


def parse_amendment(options: Mapping[str, str]) -> Amendment:
    """The options as after ``-o``, without ``size``. ConfigError for a bad one."""
    for name in options:
        if name not in AMENDABLE:
            only = any(option.name == name for option in CREATE_OPTIONS)
            raise ConfigError(
                f"Invalid parameter '{name}'" + ("\nThis option is only supported for image creation" if only else "")
            )
    compat = options.get("compat")
    if compat is not None and compat not in VERSIONS:
        raise ConfigError(f"Unknown compatibility level {compat}: there are 0.10 (v2) and 1.1 (v3)")
    bits = options.get("refcount_bits")
    if bits is not None and bits not in ("1", "2", "4", "8", "16", "32", "64"):
        raise ConfigError(f"Refcount width must be a power of two and may not exceed 64 bits, not {bits}")
    backing_file, backing_format = options.get("backing_file"), options.get("backing_fmt")
    if backing_file and not backing_format:
        raise ConfigError("backing_file needs backing_fmt: a backing format is never guessed")
    if backing_format is not None and not backing_file:
        raise ConfigError("backing_fmt needs backing_file")
    return Amendment(
        version=None if compat is None else VERSIONS[compat],
        refcount_order=None if bits is None else int(bits).bit_length() - 1,
        lazy_refcounts=_switch(options, "lazy_refcounts"),
        data_file=options.get("data_file"),
        data_file_raw=_switch(options, "data_file_raw"),
        backing=BackingReference(backing_file, backing_format) if backing_file else None,
        changes_backing=backing_file is not None,
    )


def _switch(options: Mapping[str, str], name: str) -> bool | None:
    value = options.get(name)
    if value is not None and value not in BOOLEANS:
        raise ConfigError(f"Parameter '{name}' expects 'on' or 'off', not {value}")
    return None if value is None else BOOLEANS[value]


async def amend_qcow2(storage: Storage, amendment: Amendment) -> None:
    """Change the image. ConfigError, before anything is changed, for what cannot be, with QEMU's reasons.

    CorruptImageError where the tables are to be changed and are not in order.
    """
    header = await read_header(storage)
    snapshots, _ = await read_snapshots(storage, header)
    try:
        _refuse(header, snapshots, amendment)
    except ConfigError as error:
        raise ConfigError(f"{storage.path}: {error}") from None
    version = amendment.version or header.version
    if version > header.version:
        await _upgrade(storage, header, snapshots)
    if amendment.refcount_order is not None and amendment.refcount_order != header.refcount_order:
        state = await read_state(storage)
        wider = replace(state.header, refcount_order=amendment.refcount_order)
        await replace_tables(storage, state, replace(state, header=wider))
    await _change(storage, _amended(await read_header(storage), amendment))
    if version < header.version:
        await _downgrade(storage)


def _refuse(header: Header, snapshots: list[Snapshot], amendment: Amendment) -> None:
    """ConfigError for what the image cannot become."""
    version = amendment.version or header.version
    bits = header.refcount_bits if amendment.refcount_order is None else 1 << amendment.refcount_order
    if version < 3:
        if amendment.refcount_order is not None and bits != 16:
            raise ConfigError(f"Refcount widths other than 16 bits require {_NEWER}")
        if amendment.lazy_refcounts:
            raise ConfigError(f"Lazy refcounts only supported with {_NEWER.replace(' or above', ' and above')}")
        if header.version >= 3:
            _refuse_downgrade(header, snapshots, bits)
    if amendment.data_file is not None and not header.has_data_file:
        raise ConfigError("data-file can only be set for images that use an external data file")
    if amendment.data_file_raw and not header.data_file_raw:
        raise ConfigError("data-file-raw cannot be set on existing images")
    if amendment.changes_backing and amendment.backing is not None and header.data_file_raw:
        raise ConfigError("backing_file and data_file_raw=on exclude each other")


def _refuse_downgrade(header: Header, snapshots: list[Snapshot], bits: int) -> None:
    if header.has_data_file:
        raise ConfigError("Cannot downgrade an image with a data file")
    if header.incompatible:
        raise ConfigError(f"Cannot downgrade an image with incompatible features {header.incompatible:#x} set")
    if bits != 16:
        raise ConfigError("compat=0.10 requires refcount_bits=16")
    for snapshot in snapshots:
        other_size = snapshot.disk_size is not None and snapshot.disk_size != header.size
        if other_size or snapshot.vm_state_size >= 1 << 32:
            raise ConfigError(f"Internal snapshots prevent downgrade of image: {snapshot.id} ({snapshot.name})")
    if header.bitmaps is not None:
        raise ConfigError("Dirty bitmaps prevent downgrade of image: qemu-img bitmap --remove")
    if header.crypt_method != layout.CRYPT_NONE and header.backing_name is not None:
        raise ConfigError("Encryption prevents downgrade of an image with a backing file: it has no encrypted zeroes")


async def _change(storage: Storage, new: Header) -> None:
    """Put ``new``, of which places and size are those of the header there is, in force."""
    old = await read_header(storage)
    if new != old:
        sector = await storage.read(0, SECTOR_SIZE)
        await change_header(storage, HeaderSector(storage, sector), old, new)


def _amended(header: Header, amendment: Amendment) -> Header:
    """The header with everything that is a matter of the header alone."""
    if amendment.changes_backing:
        header = header_with(header, amendment.backing)
    if amendment.lazy_refcounts is not None:
        bit = layout.COMPATIBLE_LAZY_REFCOUNTS
        kept = header.compatible & ~bit
        header = replace(header, compatible=kept | bit if amendment.lazy_refcounts else kept)
    if amendment.data_file_raw is False:
        header = replace(header, autoclear=header.autoclear & ~layout.AUTOCLEAR_DATA_FILE_RAW)
    if amendment.data_file is not None:
        name = amendment.data_file.encode("utf-8", "surrogateescape")
        others = [(kind, data) for kind, data in header.extensions if kind != layout.EXTENSION_DATA_FILE]
        own = [(layout.EXTENSION_DATA_FILE, name)] if name else []
        at = sum(kind == layout.EXTENSION_BACKING_FORMAT for kind, _ in others)
        header = replace(header, extensions=(*others[:at], *own, *others[at:]))
    return header


async def _upgrade(storage: Storage, header: Header, snapshots: list[Snapshot]) -> None:
    """Version 3: fields, the names of features, and snapshots that say what size their disk has."""
    if any(snapshot.disk_size is None for snapshot in snapshots):
        state = await read_state(storage)
        sized = [each if each.disk_size is not None else _sized(each, header.size) for each in snapshots]
        await replace_tables(storage, state, replace(state, snapshots=sized))
        header = await read_header(storage)
    names = ((layout.EXTENSION_FEATURE_NAMES, layout.feature_name_table()),)
    with_names = header.cluster_bits >= FEATURE_NAMES_MIN_CLUSTER_BITS
    await _change(
        storage,
        replace(
            header,
            version=3,
            header_length=layout.HEADER_V3_LENGTH,
            extensions=header.extensions + (names if with_names else ()),
        ),
    )


def _sized(snapshot: Snapshot, size: int) -> Snapshot:
    fields = {"vm_state_size": snapshot.vm_state_size, "disk_size": size, "icount": NO_ICOUNT}
    return replace(snapshot, disk_size=size, extra=SNAPSHOT_EXTRA.build(fields))


async def _downgrade(storage: Storage) -> None:
    """Version 2, which has no word for zeroes: they are empty entries, or data where a backing file would show."""
    state = await read_state(storage)
    backed = state.header.backing_name is not None
    await replace_tables(storage, state, state, without_zeroes=True, zeroes_as_data=backed)
    header = await read_header(storage)
    kept = tuple(item for item in header.extensions if item[0] != layout.EXTENSION_FEATURE_NAMES)
    plain = replace(
        header, version=2, header_length=layout.HEADER_V2_LENGTH, extensions=kept, compatible=0, autoclear=0, extra=b""
    )
    await _change(storage, plain)
