from __future__ import annotations

from typing import Annotated

import typer

from nbdserve.cli.option_order import OrderedCommand, given_options


def test_options_are_given_in_their_order() -> None:
    def command(
        context: typer.Context,
        names: list[str],
        first: Annotated[bool, typer.Option("--first")] = False,
        second: Annotated[list[str] | None, typer.Option("--second", "-s")] = None,
    ) -> None:
        assert first
        found.extend(given_options(context))

    found: list[tuple[str, str]] = []
    alone = typer.Typer()
    alone.command(cls=OrderedCommand)(command)
    arguments = ["--second=a", "name", "--first", "-sb", "--second", "--first", "--first", "--", "--first"]
    typer.main.get_command(alone).main(arguments, standalone_mode=False)
    assert found == [("--second", "a"), ("--first", ""), ("-s", "b"), ("--second", "--first"), ("--first", "")]
