"""One client's conversation: what each of its requests is answered. No I/O of its own."""

from __future__ import annotations

import logging
from typing import Any

from nbdserve.admin.codec import Broken
from nbdserve.admin.command import Commands, as_json
from nbdserve.admin.control import Control
from nbdserve.admin.errors import COMMAND_NOT_FOUND, QmpError, description_of
from nbdserve.admin.schema import validated
from nbdserve.errors import NbdserveError

log = logging.getLogger(__name__)

NEGOTIATE = "qmp_capabilities"


class Session:
    """``answer`` each value of the stream in turn. ``peer`` is who it is, for the log."""

    def __init__(self, control: Control, commands: Commands, peer: str) -> None:
        self.peer = peer
        self.negotiated = False
        self._control = control
        self._commands = commands

    def greeting(self) -> dict[str, Any]:
        """What a client is told first."""
        version = as_json(self._control.version)
        return {"QMP": {"version": version, "capabilities": []}}

    async def answer(self, message: Any) -> dict[str, Any]:
        """The reply to one request, never an exception for what the peer did."""
        identity = {"id": message["id"]} if isinstance(message, dict) and "id" in message else {}
        try:
            return {"return": await self._execute(message)} | identity
        except QmpError as error:
            return identity | {"error": {"class": error.kind, "desc": str(error)}}

    async def _execute(self, message: Any) -> Any:
        name, arguments = _request(message)
        if not self.negotiated and name != NEGOTIATE:
            raise QmpError(f"Expecting capabilities negotiation with '{NEGOTIATE}'", COMMAND_NOT_FOUND)
        try:
            result = await self._run(name, arguments)
        except QmpError as error:
            log.info("%s: %s: failed: %s", self.peer, name[:128], error)
            raise
        if name == NEGOTIATE:
            self.negotiated = True
        log.info("%s: %s: done", self.peer, name)
        return result

    async def _run(self, name: str, arguments: dict[str, Any]) -> Any:
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", COMMAND_NOT_FOUND)
        given = validated(command.arguments, arguments)
        if self.negotiated and name == NEGOTIATE:
            raise QmpError("Capabilities negotiation is already complete, command ignored", COMMAND_NOT_FOUND)
        try:
            return as_json(await command.run(self._control, given))
        except QmpError:
            raise
        except (NbdserveError, OSError) as error:
            raise QmpError(description_of(error)) from error
        except Exception as error:
            log.exception("%s: %s: a fault of the server", self.peer, name)
            raise QmpError(f"{name}: internal error: {type(error).__name__}") from error


def _request(message: Any) -> tuple[str, dict[str, Any]]:
    """The command and its arguments."""
    if isinstance(message, Broken):
        raise QmpError(message.problem)
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    for member, value in message.items():
        if member == "execute":
            if not isinstance(value, str):
                raise QmpError(f"QMP input member '{member}' must be a string")
        elif member == "arguments":
            if not isinstance(value, dict):
                raise QmpError(f"QMP input member '{member}' must be an object")
        elif member != "id":
            raise QmpError(f"QMP input member '{member}' is unexpected")
    if "execute" not in message:
        raise QmpError("QMP input lacks member 'execute'")
    return message["execute"], message.get("arguments", {})
