"""Objects that commands make: secrets, authorization lists, throttle groups, I/O threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from nbdserve.admin.errors import WELL_FORMED, QmpError
from nbdserve.admin.schema import Arguments, validated
from nbdserve.admin.throttling import LimitsProperty, ThrottleLimits, merged, shown
from nbdserve.block.filters.throttle import Limits, ThrottleGroup


class AuthzRule(Arguments):
    """What becomes of an identity that is ``match``, or is like it."""

    match: str
    policy: Literal["allow", "deny"]
    format: Literal["exact", "glob"] = "exact"


class AuthzList(Arguments):
    """The first rule that fits decides; without one, ``policy``."""

    policy: Literal["allow", "deny"] = "deny"
    rules: list[AuthzRule] = Field(default=[])


@dataclass(eq=False)
class ObjectEntry:
    """One object; ``properties`` are what ``qom-get`` shows, so a secret has none of its content there."""

    id: str
    kind: str
    properties: dict[str, Any] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        """Every property, by its name."""
        return {"type": self.kind} | self.properties

    def set(self, name: str, value: Any) -> None:
        """Give a property another value. QmpError where there is none of that name, or it may not be set."""
        problem = "is not writable" if name in self.shown() else "not found"
        raise QmpError(f"Property '{self.kind}.{name}' {problem}")


class ThrottleGroupEntry(ObjectEntry):
    """Limits that several nodes share."""

    def __init__(self, identity: str, given: ThrottleLimits | None = None) -> None:
        """ConfigError, QmpError for limits that cannot be."""
        super().__init__(identity, "throttle-group")
        limits = Limits()
        self.throttle = ThrottleGroup(limits if given is None else merged(limits, given))

    def shown(self) -> dict[str, Any]:
        return super().shown() | {"limits": shown(self.throttle.limits)}

    def set(self, name: str, value: Any) -> None:
        """``limits``: those that are given; the others stay. QmpError, ConfigError."""
        if name != "limits":
            super().set(name, value)
        given = validated(LimitsProperty, {"limits": value})
        self.throttle.set_limits(merged(self.throttle.limits, given.limits))


class AuthzListEntry(ObjectEntry):
    """Which identities are let in. Only a TLS client has one."""

    def __init__(self, identity: str, given: AuthzList) -> None:
        super().__init__(identity, "authz-list")
        self._list = given

    def shown(self) -> dict[str, Any]:
        return super().shown() | self._list.model_dump(include={"policy", "rules"})

    def set(self, name: str, value: Any) -> None:
        """``policy`` or ``rules``. QmpError."""
        if name not in AuthzList.model_fields:
            super().set(name, value)
        given = validated(AuthzList, {name: value})
        self._list = self._list.model_copy(update={name: getattr(given, name)})


class ObjectTable:
    """The objects by id; the content of secrets is kept apart."""

    def __init__(self) -> None:
        self._objects: dict[str, ObjectEntry] = {}
        self.secrets: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[ObjectEntry]:
        return iter(list(self._objects.values()))

    def check_new(self, identity: str) -> None:
        """QmpError when no object may have this id."""
        if not WELL_FORMED.fullmatch(identity):
            raise QmpError("Parameter 'id' expects an identifier")
        if identity in self._objects:
            raise QmpError(f"attempt to add duplicate property '{identity}' to object (type 'container')")

    def add(self, entry: ObjectEntry, secret: bytes | None = None) -> None:
        """``entry`` is known from now on, with the content it has if it is a secret."""
        self.check_new(entry.id)
        self._objects[entry.id] = entry
        if secret is not None:
            self.secrets[entry.id] = secret

    def find(self, identity: str, kind: str | None = None) -> ObjectEntry | None:
        """The object, if it is of that kind."""
        entry = self._objects.get(identity)
        return entry if entry is not None and kind in (None, entry.kind) else None

    def let_go(self) -> None:
        """Throttle groups hold nothing back any more: the server ends."""
        for entry in self:
            if isinstance(entry, ThrottleGroupEntry):
                entry.throttle.set_limits(Limits())

    def remove(self, identity: str) -> None:
        """Forget the object. QmpError when there is none, or it is in use."""
        entry = self._objects.get(identity)
        if entry is None:
            raise QmpError(f"object '{identity}' not found")
        if entry.users:
            raise QmpError(f"object '{identity}' is in use, can not be deleted")
        del self._objects[identity]
        self.secrets.pop(identity, None)
