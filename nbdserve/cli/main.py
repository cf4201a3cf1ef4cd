"""``nbdserve``: the command line. One command per module, imported when it is asked for."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from nbdserve import __version__
from nbdserve.cli.boundary import complain, guarded
from nbdserve.cli.imports import import_for_good
from nbdserve.cli.usage import UsageError

PROGRAM: Final = "nbdserve"

_MODULES: Final = {
    "serve": "nbdserve.cli.serve",
    "demo": "nbdserve.cli.demo",
    "image": "nbdserve.cli.image",
    "admin": "nbdserve.cli.admin.group",
}
"""Command -> the module whose ``app`` it is. A server needs none of what ``image`` imports, and the other way round."""


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _MODULES:
            return None
        return typer.main.get_command(import_for_good(_MODULES[cmd_name]).app)


app = typer.Typer(
    name=PROGRAM,
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Serve disk images and their backing chains over NBD."""


def main() -> None:
    """The entry point: exit code 0, 1 for an error, 2 for a command line that cannot be understood."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a thread per processor, for algebra
    sys.exit(guarded(PROGRAM, _run))


def _run() -> int:
    try:
        return int(app(standalone_mode=False) or 0)
    except UsageError as error:
        complain(PROGRAM, error.format_message())
        if error.ctx is not None:
            print(f"Try '{error.ctx.command_path} --help'.", file=sys.stderr)
        return 2
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return 1


if __name__ == "__main__":
    main()
