"""Groups of commands that are imported when they run; names and help of all of them are known before."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from nbdserve.cli.imports import import_for_good

CONTEXT: Final = {"help_option_names": ["-h", "--help"]}


class Place(NamedTuple):
    """Where a command is: a module, and the function or ``typer.Typer`` in it."""

    module: str
    name: str
    help: str
    """The first paragraph of its help, which the group's help shows."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """What click is told besides CONTEXT, for a function."""


class LazyGroup(TyperGroup):
    """The commands of ``places``."""

    places: ClassVar[Mapping[str, Place]]

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of ``places``."""
        return list(self.places)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What help needs to know of the command."""
        place = self.places.get(cmd_name)
        return None if place is None else TyperCommand(cmd_name, help=place.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that runs."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.imported(str(command.name)) if command else None, rest

    def imported(self, name: str) -> Any:
        """The command itself."""
        place = self.places[name]
        found = getattr(import_for_good(place.module), place.name)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command(name, context_settings={**CONTEXT, **place.settings})(function)
        return typer.main.get_command(found)
