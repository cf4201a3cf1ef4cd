"""``nbdserve admin VERB``: any verb of the server, and ``shell`` and ``status``."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from typer.core import TyperGroup

from nbdserve.cli.admin.arguments import parse_arguments
from nbdserve.cli.admin.client import ENVIRONMENT, AdminClient, address_or_default
from nbdserve.cli.admin.tables import as_table
from nbdserve.cli.image.common import Output, OutputOption, print_json

_MODULES: Final = {"shell": "nbdserve.cli.admin.shell", "status": "nbdserve.cli.admin.status"}


class _Verbs(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _MODULES:
            return typer.main.get_command(import_module(_MODULES[cmd_name]).app)
        return typer.main.get_command(_verb_app(cmd_name))


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    verb_app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

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
    table = as_table(result)
    if table:
        Console(highlight=False).print(table)
