"""``x-blockdev-amend``: a job that gives an encrypted image that is open another passphrase, or takes one away."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Tag

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.schema import Arguments, Int, union
from nbdserve.block.graph import Origin
from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver
from nbdserve.jobs.create import Amend


class SlotOptions(Arguments):
    """QCryptoBlockAmendOptionsLUKS; secrets are named by their ids, and ``iter-time`` is in milliseconds."""

    state: Literal["active", "inactive"]
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: Int | None = None
    iter_time: Int | None = None
    secret: str | None = None


class LuksEncryption(SlotOptions):
    """Key slots of an image that is encrypted with LUKS."""

    format: Literal["luks"]


class QcowEncryption(Arguments):
    """The older way, which has none."""

    format: Literal["qcow"]


class LuksAmendment(SlotOptions):
    """A LUKS container."""

    driver: Literal["luks"]


class Qcow2Amendment(Arguments):
    """A qcow2 image."""

    driver: Literal["qcow2"]
    encrypt: (
        Annotated[Annotated[LuksEncryption, Tag("=luks")] | Annotated[QcowEncryption, Tag("=qcow")], union("format")]
        | None
    ) = None


class NoAmendment(Arguments):
    """Of drivers in which nothing can be changed."""

    driver: str


AmendOptions: TypeAlias = Annotated[
    Annotated[LuksAmendment, Tag("=luks")]
    | Annotated[Qcow2Amendment, Tag("=qcow2")]
    | Annotated[NoAmendment, Tag("=bochs")]
    | Annotated[NoAmendment, Tag("=cloop")]
    | Annotated[NoAmendment, Tag("=copy-before-write")]
    | Annotated[NoAmendment, Tag("=dmg")]
    | Annotated[NoAmendment, Tag("=file")]
    | Annotated[NoAmendment, Tag("=host_device")]
    | Annotated[NoAmendment, Tag("=nbd")]
    | Annotated[NoAmendment, Tag("=null-co")]
    | Annotated[NoAmendment, Tag("=parallels")]
    | Annotated[NoAmendment, Tag("=qcow")]
    | Annotated[NoAmendment, Tag("=qed")]
    | Annotated[NoAmendment, Tag("=raw")]
    | Annotated[NoAmendment, Tag("=snapshot-access")]
    | Annotated[NoAmendment, Tag("=throttle")]
    | Annotated[NoAmendment, Tag("=vdi")]
    | Annotated[NoAmendment, Tag("=vhdx")]
    | Annotated[NoAmendment, Tag("=vmdk")]
    | Annotated[NoAmendment, Tag("=vpc")],
    union("driver"),
]


class AmendJob(Arguments):
    """Of ``x-blockdev-amend``."""

    job_id: str
    node_name: str
    options: AmendOptions
    force: bool = False


async def blockdev_amend(control: Control, arguments: AmendJob) -> None:
    """Start the job, which fails for whatever is wrong with the options' values."""
    given, name = arguments.options, arguments.node_name
    control.jobs.jobs.check_id(arguments.job_id)
    entry, layer = control.nodes.find(name), None
    if entry is None:
        raise QmpError(f"Cannot find device='' nor node-name='{name}'")
    if name == entry.name and not entry.is_filter:
        layer = entry.node.top
    if layer is None or entry.driver != given.driver:
        raise QmpError("x-blockdev-amend doesn't support changing the block driver")
    if isinstance(given, NoAmendment):
        raise QmpError("Driver does not support x-blockdev-amend")
    if layer.read_only:
        raise QmpError(f"Block node is read-only: '{name}'")

    async def work() -> None:
        await _change(control, given, entry.node.top, force=arguments.force)

    job = Amend(arguments.job_id, work)
    control.jobs.add(job, entry)
    job.start()


async def _change(control: Control, given: LuksAmendment | Qcow2Amendment, layer: FormatDriver, *, force: bool) -> None:
    slots: SlotOptions
    if isinstance(given, LuksAmendment):
        prefix, slots = "", given
    elif given.encrypt is None:
        return
    elif isinstance(given.encrypt, QcowEncryption):
        raise ConfigError("Amend can't be used to change the qcow2 encryption format")
    else:
        prefix, slots = "encrypt.", given.encrypt
    members = slots.model_dump(by_alias=True, exclude_none=True, exclude={"driver", "format"})
    options = {prefix + name: str(value) for name, value in members.items()}
    secrets, origin = control.objects.secrets, layer.origin
    secret = origin.spec.secret if isinstance(origin, Origin) else None
    await layer.amend_keys(options, secrets, secret=secret, force=force)
    if isinstance(origin, Origin) and secret is not None and slots.state == "inactive":
        # The image may have to be opened again, with a passphrase that is left.
        for other in (secret, *secrets.values()):
            if await layer.opens_with(other):
                layer.origin = replace(origin, spec=replace(origin.spec, secret=other))
                break


COMMANDS: Final = (Command("x-blockdev-amend", blockdev_amend, AmendJob),)
