"""Making VMDK images (VMware Virtual Disk Format 5.0): what the options mean, and the writing.

Every grain table of a sparse extent is there from the beginning, and so is its redundant copy: stock writers never make
one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.formats.create_options import parse_boolean
from nbdserve.formats.vmdk import layout
from nbdserve.formats.vmdk.descriptor import MAX_EXTENTS, NO_PARENT, ExtentLine, build_descriptor
from nbdserve.storage.base import Storage
from nbdserve.units import GIB, MIB, SECTOR_SIZE, align_up, div_ceil

SUBFORMATS: Final = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
)
ADAPTERS: Final = ("ide", "lsilogic", "buslogic", "legacyESX")
EXTENT_BYTES: Final = 2 * GIB
"""Of the guest, in each file of an image that is split."""
_AT_ONCE: Final = 16
"""Files made at a time."""

CREATE_OPTIONS: Final = (
    CreateOption("adapter_type", "Virtual adapter type, can be one of ide, lsilogic, buslogic or legacyESX", "ide"),
    CreateOption("backing_file", "File name of a base image"),
    CreateOption("backing_fmt", "Must be 'vmdk' if present"),
    CreateOption("compat6", "VMDK version 6 image", "off"),
    CreateOption("hwversion", "VMDK hardware version"),
    CreateOption("nocow", "Turn off copy-on-write (valid only on btrfs)", "off"),
    CreateOption("preallocation", "Preallocation mode of flat images (allowed values: off, falloc, full)", "off"),
    CreateOption("size", "Virtual disk size"),
    CreateOption("subformat", f"VMDK flat extent format, can be one of {', '.join(SUBFORMATS)}", SUBFORMATS[0]),
    CreateOption("toolsversion", "VMware guest tools version"),
    CreateOption("zeroed_grain", "Enable efficient zero writes using the zeroed-grain GTE feature", "off"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a new image, checked."""

    size: int
    """Bytes, whole sectors."""
    subformat: str
    adapter_type: str
    hw_version: str
    tools_version: str
    zeroed_grain: bool
    backing_file: str | None
    preallocation: str

    @property
    def flat(self) -> bool:
        """The data is in files of its own, as it is."""
        return self.subformat.endswith("Flat")

    @property
    def split(self) -> bool:
        """There is a file for each 2 GiB."""
        return self.subformat.startswith("twoGb")

    @property
    def has_files(self) -> bool:
        """The descriptor is a file, and the extents are others."""
        return self.flat or self.split

    @property
    def extent_sizes(self) -> list[int]:
        """Bytes of each extent."""
        if not self.split:
            return [self.size]
        return [min(EXTENT_BYTES, self.size - start) for start in range(0, self.size, EXTENT_BYTES)]


def parse_options(size: int, options: Mapping[str, str]) -> Options:
    """ConfigError names the option that cannot be."""
    subformat = _choice(options, "subformat", SUBFORMATS)
    parsed = Options(
        size=align_up(size, SECTOR_SIZE),
        subformat=subformat,
        adapter_type=_choice(options, "adapter_type", ADAPTERS),
        hw_version=_hw_version(options),
        tools_version=options.get("toolsversion", "2147483647"),
        zeroed_grain=parse_boolean(options, "zeroed_grain"),
        backing_file=options.get("backing_file"),
        preallocation=_choice(options, "preallocation", ("off", "falloc", "full")),
    )
    if size <= 0:
        raise ConfigError("VMDK images have at least one sector")
    if parsed.flat and parsed.zeroed_grain:
        raise ConfigError("zeroed_grain: Flat image can't enable zeroed grain")
    if parsed.flat and parsed.backing_file is not None:
        raise ConfigError("backing_file: Flat image can't have backing file")
    if not parsed.flat and parsed.preallocation != "off":
        raise ConfigError("preallocation: only flat images are preallocated")
    if options.get("backing_fmt", "vmdk") != "vmdk":
        raise ConfigError("backing_fmt: backing_file must be a vmdk image")
    _check_size(parsed)
    text = _descriptor(parsed, created_names("x", parsed), NO_PARENT, NO_PARENT)
    if not parsed.has_files and len(text) > layout.DESCRIPTOR_BYTES:
        raise ConfigError(f"the descriptor needs {len(text)} bytes, there is room for {layout.DESCRIPTOR_BYTES}")
    return parsed


def _check_size(options: Options) -> None:
    size = options.size
    if options.split:
        if div_ceil(size, EXTENT_BYTES) > MAX_EXTENTS:
            raise ConfigError(f"{size} bytes are more than {MAX_EXTENTS} extents of 2 GiB: use a monolithic subformat")
    elif not options.flat:
        plan = layout.plan_hosted(size)
        if plan.directory_entries * 4 > layout.MAX_DIRECTORY_BYTES or plan.overhead > layout.MAX_EXTENT_BYTES:
            raise ConfigError(f"{size} bytes are more than a sparse VMDK extent can have")
    if size > layout.MAX_SIZE:
        raise ConfigError(f"{size} bytes are more than the {layout.MAX_SIZE} that are possible")


def _choice(options: Mapping[str, str], name: str, values: Sequence[str]) -> str:
    value = options.get(name, values[0])
    if value not in values:
        raise ConfigError(f"{name}={value}: use one of {', '.join(values)}")
    return value


def _hw_version(options: Mapping[str, str]) -> str:
    if parse_boolean(options, "compat6"):
        if "hwversion" in options:
            raise ConfigError("compat6 cannot be enabled with hwversion set")
        return "6"
    return options.get("hwversion", "4")


def created_names(path: str, options: Options) -> list[str]:
    """The files of the extents of a new image ``path``, relative to it, as QEMU names them; none if it is its own."""
    if not options.has_files:
        return []
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    stem, suffix = (name[:dot], name[dot:]) if dot >= 0 else (name, "")
    if not options.split:
        return [f"{stem}-flat{suffix}"]
    letter = "f" if options.flat else "s"
    return [f"{stem}-{letter}{number:03d}{suffix}" for number in range(1, len(options.extent_sizes) + 1)]


def _descriptor(options: Options, names: Sequence[str], cid: int, parent_cid: int) -> bytes:
    kind = "FLAT" if options.flat else "SPARSE"
    sizes = options.extent_sizes
    return build_descriptor(
        cid=cid,
        parent_cid=parent_cid,
        create_type=options.subformat,
        parent_name=options.backing_file,
        extents=[
            ExtentLine("RW", size // SECTOR_SIZE, kind, name) for size, name in zip(sizes, names or ["x"], strict=True)
        ],
        size=options.size,
        adapter_type=options.adapter_type,
        hw_version=options.hw_version,
        tools_version=options.tools_version,
    )


async def create_vmdk(
    storage: Storage,
    size: int,
    options: Mapping[str, str],
    companions: Sequence[Storage],
    *,
    parent_cid: int,
    has_parent: bool,
) -> None:
    """Make ``storage`` an empty image, with the files ``companions`` where the subformat has such.

    What makes it an image is written last and behind a barrier: the header of a sparse extent that is a whole image,
    the descriptor where that is a file. ConfigError before anything is touched.
    """
    parsed = parse_options(size, options)
    if parsed.backing_file is not None and not has_parent:
        raise ConfigError(f"backing_file={parsed.backing_file}: it must be opened, for its content ID")
    if len(companions) != (len(parsed.extent_sizes) if parsed.has_files else 0):
        raise ConfigError(f"{parsed.subformat}: the files of the extents and the subformat go together")
    names = [file.path[file.path.rfind("/") + 1 :] for file in companions] if parsed.has_files else []
    cid = secrets.randbelow(NO_PARENT)
    text = _descriptor(parsed, names or [storage.path[storage.path.rfind("/") + 1 :]], cid, parent_cid)
    if not parsed.has_files:
        if len(text) > layout.DESCRIPTOR_BYTES:
            raise ConfigError(f"the descriptor needs {len(text)} bytes, there is room for {layout.DESCRIPTOR_BYTES}")
        await _make_sparse(storage, parsed.size, parsed, text)
        return
    parts = list(zip(companions, parsed.extent_sizes, strict=True))
    for first in range(0, len(parts), _AT_ONCE):
        await _all(
            _make_flat(file, length, parsed.preallocation) if parsed.flat else _make_sparse(file, length, parsed, b"")
            for file, length in parts[first : first + _AT_ONCE]
        )
    await _empty(storage, 0)
    await storage.write(0, text)
    await storage.flush()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Together: a flush waits for the disk, and they share that. The first error is raised when none is under way."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _empty(storage: Storage, size: int) -> None:
    """``size`` bytes of zeroes."""
    await storage.truncate(0)
    await storage.truncate(size)
    if not storage.grows_zeroed:
        await storage.zero(0, size)


async def _make_flat(file: Storage, size: int, preallocation: str) -> None:
    await _empty(file, size)
    if preallocation == "falloc":
        await file.zero(0, size, unmap=False)
    elif preallocation == "full":
        chunk = bytes(MIB)
        for offset in range(0, size, len(chunk)):
            await file.write(offset, chunk[: size - offset])
    await file.flush()


async def _make_sparse(file: Storage, size: int, options: Options, descriptor: bytes) -> None:
    """Header, descriptor, and two grain directories with the places of their tables, which are zeroes as they are."""
    plan = layout.plan_hosted(size)
    compressed = options.subformat == "streamOptimized"
    await _empty(file, plan.overhead)
    numbers = np.arange(plan.directory_entries, dtype=np.int64) * layout.TABLE_ENTRIES * 4
    for directory, tables in (
        (plan.redundant_offset, plan.redundant_tables),
        (plan.directory_offset, plan.tables),
    ):
        places = (tables + numbers) // SECTOR_SIZE
        await file.write(directory, places.astype("<u4").tobytes())
    if descriptor:
        await file.write(layout.DESCRIPTOR_OFFSET, descriptor)
        await file.flush()
    await file.write(0, layout.build_hosted(plan, compressed=compressed, zeroed_grains=options.zeroed_grain))
    await file.flush()
