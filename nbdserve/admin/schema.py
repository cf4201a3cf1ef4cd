"""Typed arguments and results of commands, and QEMU's words for what is wrong with them.

A command's arguments are a model: its fields in QEMU's order with QEMU's names (``node_name`` is ``node-name``), strict
about types, and no others. ``query-qmp-schema`` is made from the same models (``introspection.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from nbdserve.admin.errors import QmpError

_TAG: Final = "="
"""In front of the names of a union's branches, which tells them from members in the place of an error."""


def qmp_name(name: str) -> str:
    """The member that a field is: ``from_`` is ``from``, ``node_name`` is ``node-name``."""
    return name.rstrip("_").replace("_", "-")


class Arguments(BaseModel):
    """Members a client gives."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, alias_generator=qmp_name, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_null(cls, value: Any) -> Any:
        """An optional member may be left out, not given as null, which is a type of its own."""
        if isinstance(value, dict):
            for name, field in cls.model_fields.items():
                key = field.alias or name
                if key in value and value[key] is None and NULLABLE not in field.metadata:
                    expected = type_word(Annotated[field.annotation, *field.metadata, None])
                    raise PydanticCustomError("null_given", "null", {"member": key, "expected": expected})
        return value


class Result(BaseModel):
    """Members a client is given; those that are None are left out."""

    model_config = ConfigDict(extra="forbid", alias_generator=qmp_name, populate_by_name=True)


class Nothing(Arguments):
    """No arguments; as a result: ``{}``."""


NULLABLE: Final = "nullable"
"""In the annotation of a member that takes null as well."""


def _within(end: int, words: str) -> AfterValidator:
    def check(value: int) -> int:
        if not 0 <= value < end:
            raise PydanticCustomError("out_of_range", "range", {"words": words})
        return value

    return AfterValidator(check)


Uint32 = Annotated[int, _within(1 << 32, "uint32_t")]
Size = Annotated[int, _within(1 << 63, "a non-negative number below 2^64")]
Int = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
AnyValue = Annotated[Any, NULLABLE]


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def union(member: str) -> Discriminator:
    """QAPI's flat union: objects that are told apart by the string ``member``.

    Its branches are annotated ``Annotated[Model, Tag("=value")]``.
    """

    def chosen(value: Any) -> str | None:
        tag = value.get(member) if isinstance(value, dict) else getattr(value, qmp_field(member), None)
        return _TAG + tag if isinstance(tag, str) else None

    chosen.__name__ = member
    return Discriminator(chosen)


def alternate(name: str) -> Discriminator:
    """QAPI's alternate: told apart by their JSON type. ``name`` is what errors call it.

    Its branches are tagged ``=text``, ``=object`` and ``=null``.
    """

    def chosen(value: Any) -> str | None:
        if isinstance(value, str):
            return "=text"
        if isinstance(value, dict | BaseModel):
            return "=object"
        return "=null" if value is None else None

    chosen.__name__ = name
    return Discriminator(chosen)


def qmp_field(member: str) -> str:
    """The field that a member is."""
    return member.replace("-", "_")


def validated(model: Any, arguments: Mapping[str, Any]) -> Any:
    """The arguments as ``model``, or one of a union of models; QmpError with QEMU's text for the first mistake."""
    try:
        return _adapter(model).validate_python(arguments)
    except ValidationError as error:
        raise QmpError(_problem(error.errors(include_url=False)[0])) from None


_WORDS: Final = {
    "string_type": "string",
    "bool_type": "boolean",
    "int_type": "integer",
    "int_from_float": "integer",
    "float_type": "number",
    "list_type": "array",
    "model_type": "object",
    "model_attributes_type": "object",
    "dict_type": "object",
}


def _problem(detail: ErrorDetails) -> str:
    place = [part for part in detail["loc"] if not (isinstance(part, str) and part.startswith(_TAG))]
    path = _path(place)
    # QEMU's visitors forget the path, and in a list the name, where the value is of the right type and yet wrong.
    name = place[-1] if place and isinstance(place[-1], str) else "null"
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return f"Parameter '{path}' is missing"
    if kind == "extra_forbidden":
        return f"Parameter '{path}' is unexpected"
    if kind in _WORDS:
        return f"Invalid parameter type for '{path}', expected: {_WORDS[kind]}"
    if kind == "null_given":
        path = _path([*place, context["member"]])
        return f"Invalid parameter type for '{path}', expected: {context['expected']}"
    if kind == "literal_error":
        if not isinstance(given, str):
            return f"Invalid parameter type for '{path}', expected: string"
        return f"Parameter '{name}' does not accept value '{given}'"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _union_problem(place, path, str(name), given, context["discriminator"].removesuffix("()"))
    if kind == "out_of_range":
        return f"Parameter '{name}' expects {context['words']}"
    if kind in ("greater_than_equal", "less_than", "greater_than", "less_than_equal"):
        return f"Invalid parameter type for '{path}', expected: integer"
    return f"Parameter '{path}': {detail['msg'].removeprefix('Value error, ')}"


def _union_problem(place: list[Any], path: str, name: str, given: Any, member: str) -> str:
    if member[0].isupper():
        return f"Invalid parameter type for '{name}', expected: {member}"
    if not isinstance(given, dict):
        return f"Invalid parameter type for '{path}', expected: object"
    inner = _path([*place, member])
    if member not in given:
        return f"Parameter '{inner}' is missing"
    if not isinstance(given[member], str):
        return f"Invalid parameter type for '{inner}', expected: string"
    return f"Parameter '{member}' does not accept value '{given[member]}'"


def _path(place: list[Any]) -> str:
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def type_word(annotation: Any) -> str:
    """QEMU's word for the JSON type of an annotation: ``string``, ``boolean``, ``integer``, ``array``, ``object``."""
    if get_origin(annotation) is Annotated:
        for note in get_args(annotation)[1:]:
            if isinstance(note, Discriminator) and callable(note.discriminator):
                name = note.discriminator.__name__
                return name if name[0].isupper() else "object"
        return type_word(get_args(annotation)[0])
    if get_origin(annotation) in (list, tuple):
        return "array"
    if get_origin(annotation) is Literal:
        return "string"
    if get_origin(annotation) is not None:  # a union: optional members have None in it
        return type_word(next(part for part in get_args(annotation) if part is not type(None)))
    words: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}
    return words.get(annotation, "object")
