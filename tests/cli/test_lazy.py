from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from nbdserve.cli.admin.group import Verbs
from nbdserve.cli.commands import Commands
from nbdserve.cli.image.commands import ImageCommands
from nbdserve.cli.lazy import CONTEXT, LazyGroup, Place

GROUPS = (Commands, ImageCommands, Verbs)


@pytest.mark.parametrize(
    ("group", "name"), [pytest.param(group, name, id=name) for group in GROUPS for name in group.places]
)
def test_help_says_of_a_command_what_the_command_says_of_itself(group: type[LazyGroup], name: str) -> None:
    told = inspect.cleandoc(group(name="group").imported(name).help or "").split("\n\n", maxsplit=1)[0]
    assert group.places[name].help == " ".join(told.split())


class _Two(LazyGroup):
    places: ClassVar[dict[str, Place]] = {
        "calendar": Place("calendar", "main", "Of the standard library."),
        "missing": Place("nbdserve.nothing", "main", "Its module is not there."),
        "loose": Place(__name__, "loose", "Takes what it does not know.", {"ignore_unknown_options": True}),
    }


def loose(word: str) -> None:
    """Takes what it does not know."""
    print(word)


def _run(*arguments: str) -> Any:
    app = typer.Typer(cls=_Two, context_settings=CONTEXT)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, arguments)


def test_only_the_command_that_runs_is_imported() -> None:
    helped = _run("--help")
    assert helped.exit_code == 0
    assert "Its module is not there." in helped.output
    assert isinstance(_run("missing").exception, ModuleNotFoundError)
    assert _run("unknown").exit_code == 2


def test_a_function_becomes_a_command_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or inspect.getmodule(loose))
    assert _run("loose", "-1G").output == "-1G\n"
    assert _run("loose", "-h").exit_code == 0
