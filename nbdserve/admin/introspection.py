"""``query-qmp-schema``: the types of commands and events, from their models (QEMU's ``SchemaInfo``).

Types have the names of their models. Programs follow the names and do not know them: QEMU's are numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag

from nbdserve.admin.command import Command
from nbdserve.admin.events import EventType
from nbdserve.admin.schema import Nothing

Entity: TypeAlias = dict[str, Any]

_BUILTINS: Final[dict[Any, tuple[str, str]]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
    NoneType: ("null", "null"),
    Any: ("any", "value"),
}


def schema_of(commands: Mapping[str, Command], events: Iterable[EventType] = ()) -> list[Entity]:
    """Every command and event, and every type they lead to."""
    schema = _Schema()
    for command in commands.values():
        schema.add_command(command)
    for event in events:
        schema.add({"name": event.name, "meta-type": "event", "arg-type": schema.type_of(event.data or Nothing)})
    return list(schema.entities.values())


class _Schema:
    def __init__(self) -> None:
        self.entities: dict[str, Entity] = {}

    def add(self, entity: Entity) -> None:
        self.entities[entity["name"]] = entity

    def add_command(self, command: Command) -> None:
        self.add(
            {
                "name": command.name,
                "meta-type": "command",
                "arg-type": self.type_of(command.arguments, f"{command.name}-arg"),
                "ret-type": self.type_of(command.returns or Nothing),
                "allow-oob": False,
            }
        )

    def type_of(self, annotation: Any, name: str = "") -> str:
        """The name of the type, which is described where it is not yet. ``name``: for what has none of its own."""
        if annotation in _BUILTINS:
            builtin, json_type = _BUILTINS[annotation]
            self.add({"name": builtin, "meta-type": "builtin", "json-type": json_type})
            return builtin
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            chooser = next((note for note in parts[1:] if isinstance(note, Discriminator)), None)
            return self.type_of(parts[0], name) if chooser is None else self._choice(parts[0], chooser, name)
        if origin is Literal:
            return self._enum(parts, name)
        if origin is list:
            return self._array(parts[0], name)
        if origin in (Union, UnionType):
            return self.type_of(next(part for part in parts if part is not NoneType), name)
        if origin is dict:
            return self.type_of(Any)
        assert isinstance(annotation, type), annotation
        assert issubclass(annotation, BaseModel), annotation
        return self._object(annotation)

    def _array(self, element: Any, name: str) -> str:
        inner = self.type_of(element, name)
        self.add({"name": f"[{inner}]", "meta-type": "array", "element-type": inner})
        return f"[{inner}]"

    def _enum(self, values: tuple[str, ...], name: str) -> str:
        members = [{"name": value} for value in values]
        self.add({"name": name, "meta-type": "enum", "members": members, "values": list(values)})
        return name

    def _object(self, model: type[BaseModel]) -> str:
        name = model.__name__
        if name not in self.entities:
            self.add({"name": name, "meta-type": "object", "members": []})
            self.entities[name]["members"] = [
                self._member(model, field, info.alias or field) for field, info in model.model_fields.items()
            ]
        return name

    def _member(self, model: type[BaseModel], field: str, alias: str) -> Entity:
        info = model.model_fields[field]
        annotation: Any = info.annotation
        if info.metadata:
            annotation = Annotated[annotation, *info.metadata]
        if info.discriminator is not None:
            annotation = Annotated[annotation, info.discriminator]
        member: Entity = {"name": alias, "type": self.type_of(annotation, f"{model.__name__}.{alias}")}
        return member if info.is_required() else member | {"default": None}

    def _choice(self, branches: Any, chooser: Discriminator, name: str) -> str:
        assert callable(chooser.discriminator)
        by = chooser.discriminator.__name__
        tagged = [_untagged(branch) for branch in get_args(branches)]
        if by[0].isupper():
            if by not in self.entities:
                self.add({"name": by, "meta-type": "alternate", "members": []})
                self.entities[by]["members"] = [{"type": self.type_of(model, by)} for _, model in tagged]
            return by
        name = name or "union"
        if name not in self.entities:
            self.add({"name": name, "meta-type": "object", "members": [], "tag": by, "variants": []})
            values = self._enum(tuple(tag for tag, _ in tagged), f"{name}.{by}")
            self.entities[name]["members"] = [{"name": by, "type": values}]
            self.entities[name]["variants"] = [{"case": tag, "type": self.type_of(model)} for tag, model in tagged]
        return name


def _untagged(branch: Any) -> tuple[str, Any]:
    """The tag, without its mark, and the model of a branch."""
    model, *notes = get_args(branch)
    tag = next(note.tag for note in notes if isinstance(note, Tag))
    return tag[1:], model
