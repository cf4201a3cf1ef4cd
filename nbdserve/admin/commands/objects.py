"""``object-add`` and ``object-del``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Tag

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.objects import AuthzList, AuthzListEntry, ObjectEntry, ThrottleGroupEntry
from nbdserve.admin.schema import Arguments, Int, union
from nbdserve.admin.throttling import ThrottleLimits


class SecretObject(Arguments):
    """A passphrase, in a file: on this socket it would be shown to whoever records the conversation."""

    qom_type: Literal["secret"]
    id: str
    file: str | None = None
    data: str | None = None
    format: Literal["raw", "base64"] = "raw"


class ThrottleGroupOptions(Arguments):
    """Limits that several nodes share."""

    qom_type: Literal["throttle-group"]
    id: str
    limits: ThrottleLimits | None = None


class IoThread(Arguments):
    """Accepted: the server has one event loop, and threads of its own behind it."""

    qom_type: Literal["iothread"]
    id: str
    poll_max_ns: Int | None = None
    poll_grow: Int | None = None
    poll_shrink: Int | None = None


class AuthzListOptions(AuthzList):
    """Which identities are let in."""

    qom_type: Literal["authz-list"]
    id: str


class TlsCredentials(Arguments):
    """Known, and refused."""

    qom_type: Literal["tls-creds-anon", "tls-creds-psk", "tls-creds-x509"]
    id: str
    endpoint: Literal["client", "server"] = "client"
    dir: str | None = None
    verify_peer: bool = True
    priority: str | None = None
    username: str | None = None
    passwordid: str | None = None
    sanity_check: bool = True


ObjectOptions: TypeAlias = Annotated[
    Annotated[SecretObject, Tag("=secret")]
    | Annotated[AuthzListOptions, Tag("=authz-list")]
    | Annotated[ThrottleGroupOptions, Tag("=throttle-group")]
    | Annotated[IoThread, Tag("=iothread")]
    | Annotated[TlsCredentials, Tag("=tls-creds-anon")]
    | Annotated[TlsCredentials, Tag("=tls-creds-psk")]
    | Annotated[TlsCredentials, Tag("=tls-creds-x509")],
    union("qom-type"),
]


class ObjectId(Arguments):
    """Of ``object-del``."""

    id: str


async def object_add(control: Control, options: ObjectOptions) -> None:
    """A new object."""
    control.objects.check_new(options.id)
    if isinstance(options, TlsCredentials):
        raise QmpError(
            f"'{options.qom_type}': TLS is not supported yet; listen on a unix socket or on loopback, "
            "and let a tunnel encrypt"
        )
    if isinstance(options, AuthzListOptions):
        control.objects.add(AuthzListEntry(options.id, options))
        return
    if isinstance(options, ThrottleGroupOptions):
        control.objects.add(ThrottleGroupEntry(options.id, options.limits))
        return
    if isinstance(options, IoThread):
        control.objects.add(ObjectEntry(options.id, options.qom_type))
        return
    if options.data is not None:
        raise QmpError("'data' would show the secret to whoever records this conversation; give 'file'")
    if options.file is None:
        raise QmpError("Either 'file' or 'data' must be provided")
    properties = {"qom-type": "secret", "id": options.id, "file": options.file, "format": options.format}
    secret = await asyncio.to_thread(control.read_secret, properties, control.private_paths.open_secret)
    shown = {"file": options.file, "format": options.format, "loaded": True}
    control.objects.add(ObjectEntry(options.id, options.qom_type, shown), secret)


async def object_del(control: Control, arguments: ObjectId) -> None:
    """Forget it."""
    control.objects.remove(arguments.id)


COMMANDS: Final = (
    Command("object-add", object_add, ObjectOptions),
    Command("object-del", object_del, ObjectId),
)
