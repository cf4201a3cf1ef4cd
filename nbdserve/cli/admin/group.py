"""``nbdserve admin VERB``: any verb of the server, and ``shell`` and ``status``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from nbdserve.cli.admin.arguments import parse_arguments
from nbdserve.cli.admin.client import ENVIRONMENT, AdminClient, address_or_default
from nbdserve.cli.lazy import CONTEXT, LazyGroup, Place
from nbdserve.cli.output import Output, OutputOption, print_json


class Verbs(LazyGroup):
    """``shell`` and ``status``; any other word is for the server to know."""

    places: ClassVar[Mapping[str, Place]] = {
        "shell": Place(
            "nbdserve.cli.admin.shell",
            "shell",
            "Verbs one after the other, `VERB name=value ...`; Tab completes names, `help` says more, Ctrl-D ends it.",
        ),
        "status": Place("nbdserve.cli.admin.status", "status", "Exports, clients, jobs and throughput at a glance."),
    }

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """There is always one."""
        return super().get_command(ctx, cmd_name) or TyperCommand(cmd_name)

    def imported(self, name: str) -> Any:
        """The command itself."""
        return super().imported(name) if name in self.places else typer.main.get_command(_verb_app(name))


app = typer.Typer(name="admin", cls=Verbs, no_args_is_help=True, add_completion=False, context_settings=CONTEXT)


@app.callback()
def _root(
    ctx: typer.Context,
    socket: Annotated[
        str | None,
        typer.Option(
            "--socket",
            "-s",
            metavar="SOCK",
            help=f"The server's admin socket: a path, or HOST:PORT. Default: ${ENVIRONMENT}.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Drive a running server: `nbdserve admin VERB name=value ...`, with any verb that `query-commands` lists."""
    ctx.obj = socket


def _verb_app(verb: str) -> typer.Typer:
    """The command for one verb, which only the server knows."""
    verb_app = typer.Typer(add_completion=False, context_settings=CONTEXT)

    @verb_app.command(name=verb)
    def run(
        ctx: typer.Context,
        arguments: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[NAME=VALUE]...",
                help="Arguments: values are JSON or strings, a dot in a name leads into an object.",
                show_default=False,
            ),
        ] = None,
        output: OutputOption = Output.HUMAN,
    ) -> int:
        """Execute the verb and print what it returns. `help VERB` in `nbdserve admin shell` lists its arguments."""
        given = parse_arguments(arguments or [])
        with AdminClient(address_or_default(ctx.obj)) as client:
            show(client.execute(verb, given), output)
        return 0

    return verb_app


def show(result: Any, output: Output) -> None:
    """Print a result."""
    if output is Output.JSON:
        print_json(result)
        return
    # Imported for those who want to see it: 60 ms.
    from rich.console import Console  # noqa: PLC0415

    from nbdserve.cli.admin.tables import as_table  # noqa: PLC0415

    table = as_table(result)
    if table:
        Console(highlight=False).print(table)
