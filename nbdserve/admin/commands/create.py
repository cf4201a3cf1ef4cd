"""``blockdev-create``: a job that makes a file, or an image on a file that is a node."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Tag

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Size, union
from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.raw import RawDriver
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.create import Create
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage
from nbdserve.units import SECTOR_SIZE

Preallocation: TypeAlias = Literal["off", "metadata", "falloc", "full"]


class FileCreation(Arguments):
    """A file."""

    driver: Literal["file"]
    filename: str
    size: Size
    preallocation: Literal["off", "falloc", "full"] = "off"


class Creation(Arguments):
    """An image on ``file``, the name of a node."""

    driver: str
    file: str
    size: Size


class Cipher(Arguments):
    """What a LUKS header says of the encryption."""

    key_secret: str | None = None
    cipher_alg: str | None = None
    cipher_mode: str | None = None
    ivgen_alg: str | None = None
    ivgen_hash_alg: str | None = None
    hash_alg: str | None = None
    iter_time: Size | None = None


class Encryption(Cipher):
    """How the content is to be encrypted."""

    format: Literal["qcow", "luks"]


class LuksCreation(Cipher, Creation):
    """A LUKS container."""

    driver: Literal["luks"]


class Overlay(Creation):
    """An image that may have a backing file, which is only named."""

    backing_file: str | None = None
    backing_fmt: str | None = None


class ParallelsCreation(Creation):
    """A Parallels image."""

    driver: Literal["parallels"]
    cluster_size: Size | None = None


class QcowCreation(Overlay):
    """A qcow image."""

    driver: Literal["qcow"]
    encrypt: Encryption | None = None


class Qcow2Creation(Overlay):
    """A qcow2 image."""

    driver: Literal["qcow2"]
    extended_l2: bool | None = None
    version: Literal["v2", "v3"] | None = None
    encrypt: Encryption | None = None
    cluster_size: Size | None = None
    preallocation: Preallocation | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: Size | None = None
    compression_type: Literal["zlib", "zstd"] | None = None


class QedCreation(Overlay):
    """A QED image."""

    driver: Literal["qed"]
    cluster_size: Size | None = None
    table_size: Size | None = None


class VdiCreation(Creation):
    """A VDI image."""

    driver: Literal["vdi"]
    preallocation: Literal["off", "metadata"] = "off"


class VhdxCreation(Creation):
    """A VHDX image."""

    driver: Literal["vhdx"]
    log_size: Size | None = None
    block_size: Size | None = None
    subformat: Literal["dynamic", "fixed"] | None = None
    block_state_zero: bool | None = None


class VmdkCreation(Creation):
    """A VMDK image of one file."""

    driver: Literal["vmdk"]
    subformat: Literal["monolithicSparse", "streamOptimized"] | None = None
    adapter_type: Literal["ide", "buslogic", "lsilogic", "legacyESX"] | None = None
    hwversion: str | None = None
    toolsversion: str | None = None
    zeroed_grain: bool | None = None


class VpcCreation(Creation):
    """A VHD image."""

    driver: Literal["vpc"]
    subformat: Literal["dynamic", "fixed"] | None = None
    force_size: bool | None = None


class NoCreation(Arguments):
    """Of drivers that make nothing."""

    driver: str


CreateOptions: TypeAlias = Annotated[
    Annotated[FileCreation, Tag("=file")]
    | Annotated[LuksCreation, Tag("=luks")]
    | Annotated[ParallelsCreation, Tag("=parallels")]
    | Annotated[QcowCreation, Tag("=qcow")]
    | Annotated[Qcow2Creation, Tag("=qcow2")]
    | Annotated[QedCreation, Tag("=qed")]
    | Annotated[VdiCreation, Tag("=vdi")]
    | Annotated[VhdxCreation, Tag("=vhdx")]
    | Annotated[VmdkCreation, Tag("=vmdk")]
    | Annotated[VpcCreation, Tag("=vpc")]
    | Annotated[NoCreation, Tag("=raw")]
    | Annotated[NoCreation, Tag("=host_device")]
    | Annotated[NoCreation, Tag("=null-co")]
    | Annotated[NoCreation, Tag("=nbd")],
    union("driver"),
]


class CreateJob(Arguments):
    """Of ``blockdev-create``."""

    job_id: str
    options: CreateOptions


async def blockdev_create(control: Control, arguments: CreateJob) -> None:
    """Start the job, which fails for whatever is wrong with the options' values."""
    given = arguments.options
    control.jobs.jobs.check_id(arguments.job_id)
    if isinstance(given, NoCreation):
        raise QmpError("Driver does not support blockdev-create")

    async def work() -> None:
        if isinstance(given, FileCreation):
            await _make_file(control, given)
        else:
            await _make_image(control, given)

    job = Create(arguments.job_id, work)
    control.jobs.add(job)
    job.start()


async def _make_file(control: Control, given: FileCreation) -> None:
    options = {"preallocation": given.preallocation}
    RawDriver.validate_create(given.size, options)
    file, is_new = await control.paths.create(given.filename)
    try:
        await RawDriver.create(file, given.size, options)
    except BaseException:
        if is_new:
            await control.paths.remove(file.path)
        raise
    finally:
        await file.close()


async def _make_image(control: Control, given: Creation) -> None:
    entry = control.nodes.either(given.file)
    storage = entry.node.top.storage
    if entry.driver not in ("file", "host_device") or not isinstance(storage, FileStorage):
        raise QmpError(f"Node '{entry.name}' is no file: driver '{entry.driver}' cannot hold an image here")
    if entry.users:
        raise QmpError(f"Node '{entry.name}' is in use by {entry.users[0]}")
    if entry.node.read_only:
        raise QmpError(f"Block node is read-only: '{entry.name}' cannot be written")
    driver = driver_for(given.driver)
    options, secret = _options(control, driver, given)
    driver.validate_create(given.size, options)
    if given.size % SECTOR_SIZE:
        raise QmpError(f"Image size must be a multiple of {SECTOR_SIZE} bytes")
    if driver.created_size(given.size, options) != given.size:
        raise QmpError(f"A {given.driver} image cannot have {given.size} bytes")
    entry.users.append("job 'create'")
    try:
        file = await storage.share(cache=entry.cache)
        try:
            if not file.is_device:
                await file.truncate(0)
            await driver.create(file, given.size, options, secret=secret)
            await file.flush()
        finally:
            await file.close()
        await _renew(control, entry, storage)
    finally:
        entry.users.remove("job 'create'")


async def _renew(control: Control, entry: NodeEntry, storage: FileStorage) -> None:
    """The node has the size of its file again."""
    old = entry.node.top
    async with entry.node.drained():
        file: Storage = await storage.share(cache=entry.cache)
        entry.node.replace_layers([await RawDriver.open(file, {}, read_only=False)])
    control.nodes.renew(old, entry.node.top)
    await old.close()


def _options(control: Control, driver: type[FormatDriver], given: Creation) -> tuple[dict[str, str], bytes | None]:
    """The options that are given as ``create`` takes them, and the secret they name."""
    known = {option.name for option in driver.create_options}
    options: dict[str, str] = {}
    members = given.model_dump(by_alias=True, exclude_none=True, exclude={"driver", "file", "size"})
    for member, value in _flat(members):
        snake = member.replace("-", "_")
        if snake == "version":
            name, text = "compat", {"v2": "0.10", "v3": "1.1"}[value]
        elif snake == "preallocation" and driver.name == "vdi":
            name, text = "static", "on" if value == "metadata" else "off"
        else:
            name = snake if snake in known else member
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
        if name not in known:
            raise QmpError(f"{driver.name} images have no '{member}'")
        options[name] = text
    secret = None
    for name in ("encrypt.key-secret", "key-secret"):
        if name in options:
            secret = control.objects.secrets.get(options[name])
            if secret is None:
                raise QmpError(f"No secret with id '{options[name]}'")
    if secret is None and (driver.name == "luks" or "encrypt.format" in options):
        raise ConfigError("Parameter 'key-secret' is required for cipher")
    if options.get("encrypt.format") == "qcow":
        options["encrypt.format"] = "aes"
    return options, secret


def _flat(members: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in members.items():
        if isinstance(value, dict):
            found += [(f"{name}.{inner}", each) for inner, each in value.items()]
        else:
            found.append((name, value))
    return found


COMMANDS: Final = (Command("blockdev-create", blockdev_create, CreateJob),)
