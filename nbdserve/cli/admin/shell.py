"""``nbdserve admin shell``: verbs one after the other, with their names completed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

import typer

from nbdserve.cli.admin.arguments import parse_arguments
from nbdserve.cli.admin.client import AdminClient, address_or_default
from nbdserve.cli.admin.group import show
from nbdserve.cli.image.common import Output, OutputOption
from nbdserve.errors import NbdserveError

try:
    import readline
except ImportError:  # a Python built without it
    readline = None  # type: ignore[assignment]

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

_PROMPT: Final = "nbdserve> "


@app.command()
def shell(ctx: typer.Context, output: OutputOption = Output.HUMAN) -> int:
    """Verbs one after the other, `VERB name=value ...`; Tab completes names, Ctrl-D or `exit` ends it."""
    with AdminClient(address_or_default(ctx.obj)) as client:
        _complete_with(Completer(client.execute("query-qmp-schema")))
        try:
            for line in _lines():
                if not run_line(client, line, output):
                    break
        except EOFError:
            print("the server is gone", file=sys.stderr)
            return 1
    return 0


def _lines() -> Iterable[str]:
    prompt = _PROMPT if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def run_line(client: AdminClient, line: str, output: Output) -> bool:
    """Do what the line says and print the outcome, and the events before it; False: it says to end."""
    try:
        words = shlex.split(line, comments=True)
        client.poll()
        if words == ["exit"]:
            return False
        if words:
            show(client.execute(words[0], parse_arguments(words[1:])), output)
    except (NbdserveError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        events, client.events = client.events, []
        for event in events:
            print(f"{event['event']} {json.dumps(event.get('data', {}))}")
    return True


class Completer:
    """Names of verbs, and of the arguments of the verb at the beginning of the line."""

    def __init__(self, schema: Iterable[Mapping[str, Any]]) -> None:
        types = {entity["name"]: entity for entity in schema}
        self._members = {
            name: _members(types, entity["arg-type"])
            for name, entity in types.items()
            if entity["meta-type"] == "command"
        }

    def candidates(self, line: str, text: str) -> list[str]:
        """What ``text``, at the end of ``line``, may become."""
        before = line[: len(line) - len(text)].split()
        if not before:
            return sorted(name for name in [*self._members, "exit"] if name.startswith(text))
        return [f"{name}=" for name in self._members.get(before[0], []) if name.startswith(text)]


def _members(types: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """The members of an object, and of the branches of a union."""
    entity = types[name]
    found = dict.fromkeys(member["name"] for member in entity.get("members", []))
    for variant in entity.get("variants", []):
        found |= dict.fromkeys(_members(types, variant["type"]))
    return list(found)


def _complete_with(completer: Completer) -> None:
    if readline is None:
        return

    def complete(text: str, state: int) -> str | None:
        found = completer.candidates(readline.get_line_buffer()[: readline.get_endidx()], text)
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
