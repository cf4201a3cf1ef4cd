"""Every command there is, by name."""

from __future__ import annotations

from typing import Final

from nbdserve.admin.command import Command
from nbdserve.admin.commands import exports, nodes, objects, protocol, vm

COMMANDS: Final[dict[str, Command]] = {
    command.name: command for module in (protocol, vm, objects, nodes, exports) for command in module.COMMANDS
}
