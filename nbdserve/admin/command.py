"""What a command is: a name, typed arguments and result, and what it does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel

from nbdserve.admin.schema import Nothing

if TYPE_CHECKING:
    from nbdserve.admin.control import Control

Handler: TypeAlias = "Callable[[Control, Any], Awaitable[Any]]"


@dataclass(frozen=True, slots=True)
class Command:
    """``run`` gets a value of ``arguments`` and returns one of ``returns``, or None for ``{}``."""

    name: str
    run: Handler
    arguments: Any = Nothing
    """A model, or a union of models."""
    returns: Any = None
    """The annotation of the result: a model, a list of them, or None."""


Commands: TypeAlias = Mapping[str, Command]


def as_json(value: Any) -> Any:
    """A handler's result as JSON values."""
    if value is None:
        return {}
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_none=True)
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return value
