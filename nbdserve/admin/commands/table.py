"""Every command there is, by name."""

from __future__ import annotations

from typing import Final

from nbdserve.admin.command import Command
from nbdserve.admin.commands import bitmaps, exports, jobs, live, nodes, objects, protocol, status, transaction, vm

COMMANDS: Final[dict[str, Command]] = {
    command.name: command
    for module in (protocol, vm, objects, nodes, exports, bitmaps, jobs, live, transaction, status)
    for command in module.COMMANDS
}
