"""The commands of ``nbdserve image``, each imported when it is asked for: a copy needs none of what a check does."""

from __future__ import annotations

from typing import Any, Final

import typer
from typer.core import TyperGroup

from nbdserve.cli.imports import import_for_good

_PLACES: Final = {
    "create": "create:create",
    "convert": "convert:convert",
    "compare": "compare:compare",
    "dd": "dd:dd",
    "measure": "measure:measure",
    "bench": "bench:bench",
    "info": "info:info",
    "map": "map:map_image",
    "check": "check:check",
    "commit": "commit:commit",
    "rebase": "rebase:rebase",
    "resize": "resize:resize",
    "snapshot": "snapshot:snapshot",
    "amend": "amend:amend",
    "raw-cow": "raw_cow:app",
}
"""Command -> the module beside this one, and the function or group in it."""

_CONTEXT: Final = {"help_option_names": ["-h", "--help"]}
_SPECIAL: Final[dict[str, dict[str, Any]]] = {"resize": {"ignore_unknown_options": True}}  # -1G is a size


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_PLACES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _PLACES:
            return None
        module, _, name = _PLACES[cmd_name].partition(":")
        found = getattr(import_for_good(f"nbdserve.cli.image.{module}"), name)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name, context_settings=_CONTEXT | _SPECIAL.get(cmd_name, {}))(found)
        return typer.main.get_command(alone)


app = typer.Typer(
    name="image",
    cls=_Commands,
    help="Make, copy and look at image files, with qemu-img's options and exit codes.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=_CONTEXT,
)


@app.callback()
def _group() -> None:
    """Make, copy and look at image files, with qemu-img's options and exit codes."""
