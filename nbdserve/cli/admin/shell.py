"""``nbdserve admin shell``: verbs one after the other, with their names completed."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import typer

from nbdserve.cli.admin.arguments import parse_arguments
from nbdserve.cli.admin.client import AdminClient, GoneError, VerbError, address_or_default
from nbdserve.cli.admin.group import show
from nbdserve.cli.admin.status import glance
from nbdserve.cli.output import Output, OutputOption
from nbdserve.errors import NbdserveError

try:
    import readline
except ImportError:  # a Python built without it
    readline = None  # type: ignore[assignment]

_PROMPT: Final = "nbdserve> "
_OWN: Final = ("exit", "help", "status")
_USAGE: Final = """\
VERB name=value ...   values are JSON or strings, a dot in a name leads into an object
help VERB             the arguments it takes; those in brackets may be left out
status                exports, clients, jobs and throughput
exit                  or Ctrl-D
"""


def shell(ctx: typer.Context, output: OutputOption = Output.HUMAN) -> int:
    """Verbs one after the other, `VERB name=value ...`; Tab completes names, `help` says more, Ctrl-D ends it."""
    with AdminClient(address_or_default(ctx.obj)) as client:
        schema = Schema(client.execute("query-qmp-schema"))
        _complete_with(schema)
        for line in _lines():
            if not run_line(client, schema, line, output):
                break
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


def run_line(client: AdminClient, schema: Schema, line: str, output: Output) -> bool:
    """Do what the line says and print the outcome, and the events before it; False: it says to end. GoneError."""
    try:
        words = shlex.split(line, comments=True)
        client.poll()
        match words:
            case []:
                pass
            case ["exit"]:
                return False
            case ["status"]:
                glance(client)
            case ["help" | "?" | "--help", *verbs]:
                print(schema.help(verbs))
            case [verb, "--help" | "-h"]:
                print(schema.help([verb]))
            case [verb, *arguments]:
                show(client.execute(verb, parse_arguments(arguments)), output)
    except GoneError:
        raise
    except (NbdserveError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        events, client.events = client.events, []
        for event in events:
            print(f"{event['event']} {json.dumps(event.get('data', {}))}")
    return True


class Schema:
    """The verbs there are, and their arguments, for help and completion."""

    def __init__(self, schema: Iterable[Mapping[str, Any]]) -> None:
        self._types = {entity["name"]: entity for entity in schema}
        self._members = {
            name: _members(self._types, entity["arg-type"])
            for name, entity in self._types.items()
            if entity["meta-type"] == "command"
        }

    def help(self, verbs: Sequence[str]) -> str:
        """What can be typed, or what arguments these verbs take. VerbError for one there is not."""
        if not verbs:
            return f"{_USAGE}\n{textwrap.fill(' '.join(sorted(self._members)), break_on_hyphens=False)}"
        return "\n".join(line for verb in verbs for line in self._help_lines(verb))

    def _help_lines(self, verb: str) -> list[str]:
        if verb not in self._members:
            raise VerbError(f"The command {verb} has not been found")
        members = self._members[verb]
        if not members:
            return [verb, "  no arguments"]
        width = max(map(len, members))
        return [verb] + [f"  {name:<{width}}  {self._described(member)}" for name, member in members.items()]

    def _described(self, member: Mapping[str, Any]) -> str:
        """The type of an argument, or its values, and whether it may be left out."""
        entity = self._types[member["type"]]
        words = {"builtin": entity["name"], "enum": " | ".join(entity.get("values", [])), "array": "list"}
        kind = words.get(entity["meta-type"], "object")
        return f"[{kind}]" if "default" in member else kind

    def candidates(self, line: str, text: str) -> list[str]:
        """What ``text``, at the end of ``line``, may become."""
        before = line[: len(line) - len(text)].split()
        if not before:
            return sorted(f"{name} " for name in [*self._members, *_OWN] if name.startswith(text))
        if before[0] == "help":
            return sorted(name for name in self._members if name.startswith(text))
        return [f"{name}=" for name in self._members.get(before[0], []) if name.startswith(text)]


def _members(types: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Mapping[str, Any]]:
    """The members of an object, and of the branches of a union."""
    entity = types[name]
    found = {member["name"]: member for member in entity.get("members", [])}
    for variant in entity.get("variants", []):
        found = _members(types, variant["type"]) | found
    return found


def _complete_with(schema: Schema) -> None:
    if readline is None:
        return

    def complete(text: str, state: int) -> str | None:
        found = schema.candidates(readline.get_line_buffer()[: readline.get_endidx()], text)
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set show-all-if-ambiguous on")
