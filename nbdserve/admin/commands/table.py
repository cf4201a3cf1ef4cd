"""Every command there is, by name."""

from __future__ import annotations

from typing import Final

from nbdserve.admin.command import Command
from nbdserve.admin.commands import protocol

COMMANDS: Final[dict[str, Command]] = {
    command.name: command for module in (protocol,) for command in sorted(module.COMMANDS, key=lambda each: each.name)
}
