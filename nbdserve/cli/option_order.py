"""Commands to whom the order of their options matters, which typer does not tell."""

from __future__ import annotations

import getopt
from typing import Any, Final

import typer
from typer.core import TyperCommand

_GIVEN: Final = "nbdserve.given"


class OrderedCommand(TyperCommand):
    """Keeps what it was given, for ``given_options``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command."""
        ctx.meta[_GIVEN] = list(args)
        return list(super().parse_args(ctx, args))


def given_options(context: typer.Context) -> list[tuple[str, str]]:
    """The options of an ``OrderedCommand`` in their order, each with its value; that of a flag is empty."""
    short, long = "", []
    for parameter in context.command.params:
        takes_value = not getattr(parameter, "is_flag", False)
        for name in parameter.opts:
            if name.startswith("--"):
                long.append(name[2:] + "=" * takes_value)
            elif name.startswith("-"):
                short += name[1:] + ":" * takes_value
    return getopt.gnu_getopt(context.meta[_GIVEN], short, long)[0]
