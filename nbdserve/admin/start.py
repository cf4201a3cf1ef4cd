"""The admin side of a running server, up and down."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nbdserve.admin.commands.table import COMMANDS
from nbdserve.admin.control import Control
from nbdserve.admin.server import AdminServer, bind_admin
from nbdserve.server.addresses import Address

log = logging.getLogger("nbdserve.admin")


class Admin:
    """Bound sockets, then a server on them. ``release`` in any case; ``close`` after ``start``."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        """ConfigError when one of them cannot be listened on."""
        self.listeners = bind_admin(addresses)
        self._server: AdminServer | None = None

    async def start(self, control: Control) -> None:
        """Accept clients, who act on ``control``."""
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)  # who did what is written down
        control.commands = COMMANDS
        self._server = AdminServer(control, COMMANDS)
        for listener in self.listeners:
            await self._server.listen(listener)

    async def close(self) -> None:
        """Say goodbye to the clients. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.close()

    def release(self) -> None:
        """Close the sockets and remove their files. Idempotent."""
        for listener in self.listeners:
            listener.close()
