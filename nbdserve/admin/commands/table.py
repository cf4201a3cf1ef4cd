"""Every command there is, by name."""

from __future__ import annotations

from typing import Final

from nbdserve.admin.command import Command
from nbdserve.admin.commands import (
    amend,
    backup,
    bitmaps,
    blockstats,
    create,
    exports,
    internal_snapshots,
    jobs,
    live,
    mirror,
    nodes,
    objects,
    protocol,
    reopen,
    snapshots,
    status,
    transaction,
    vm,
)

_MODULES: Final = (
    protocol,
    vm,
    objects,
    nodes,
    reopen,
    create,
    amend,
    blockstats,
    exports,
    bitmaps,
    jobs,
    live,
    mirror,
    backup,
    snapshots,
    internal_snapshots,
    transaction,
    status,
)

COMMANDS: Final[dict[str, Command]] = {command.name: command for module in _MODULES for command in module.COMMANDS}
