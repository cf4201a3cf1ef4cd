"""The commands of ``nbdserve``. A server needs none of what ``image`` imports, and the other way round."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, ClassVar

import typer

from nbdserve import __version__
from nbdserve.cli.boundary import complain
from nbdserve.cli.lazy import CONTEXT, LazyGroup, Place
from nbdserve.cli.usage import UsageError


class Commands(LazyGroup):
    """One module each."""

    places: ClassVar[Mapping[str, Place]] = {
        "serve": Place("nbdserve.cli.serve", "serve", "Serve images over NBD, and print the URIs to connect to."),
        "demo": Place(
            "nbdserve.cli.demo",
            "demo",
            "Make a qcow2 image and an overlay over it, serve them, and say what to try.",
        ),
        "image": Place(
            "nbdserve.cli.image.commands",
            "app",
            "Make, copy and look at image files, with qemu-img's options and exit codes.",
        ),
        "admin": Place(
            "nbdserve.cli.admin.group",
            "app",
            "Drive a running server: `nbdserve admin VERB name=value ...`, with any verb that `query-commands` lists.",
        ),
    }


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, context_settings=CONTEXT)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"nbdserve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Serve disk images and their backing chains over NBD."""


def run(program: str) -> int:
    """Do what the command line asks for: the exit code, 2 for a command line that cannot be understood."""
    try:
        return int(app(standalone_mode=False) or 0)
    except UsageError as error:
        complain(program, error.format_message())
        if error.ctx is not None:
            print(f"Try '{error.ctx.command_path} --help'.", file=sys.stderr)
        return 2
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return 1
