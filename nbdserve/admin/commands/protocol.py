"""The protocol's own commands."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control, VersionInfo
from nbdserve.admin.errors import QmpError
from nbdserve.admin.events import EVENTS
from nbdserve.admin.introspection import schema_of
from nbdserve.admin.job_control import JOB_EVENTS
from nbdserve.admin.schema import Arguments, Nothing, Result


class Capabilities(Arguments):
    """Of ``qmp_capabilities``."""

    enable: list[Literal["oob"]] = Field(default=[])


class CommandInfo(Result):
    """Of ``query-commands`` and ``query-events``."""

    name: str


class SchemaInfo(Result):
    """Of ``query-qmp-schema``; which members there are besides depends on ``meta-type``."""

    model_config = ConfigDict(extra="allow")

    name: str
    meta_type: str


class CommandLineOptions(Arguments):
    """Of ``query-command-line-options``."""

    option: str | None = None


class CommandLineOption(Result):
    """An option of QEMU's command line, of which there is none here."""

    option: str
    parameters: list[str]


async def qmp_capabilities(control: Control, arguments: Capabilities) -> None:
    """The session notes that it has happened."""
    if arguments.enable:
        raise QmpError(f"Capability {arguments.enable[0]} not available")


async def query_version(control: Control, arguments: Nothing) -> VersionInfo:
    """As in the greeting."""
    return control.version


async def query_commands(control: Control, arguments: Nothing) -> list[CommandInfo]:
    """All there are."""
    return [CommandInfo(name=name) for name in control.commands]


async def query_events(control: Control, arguments: Nothing) -> list[CommandInfo]:
    """The events there are, for clients from before QEMU 6.0, which has the schema only."""
    return [CommandInfo(name=event.name) for event in (*EVENTS, *JOB_EVENTS)]


async def query_qmp_schema(control: Control, arguments: Nothing) -> list[dict[str, Any]]:
    """The types of all commands and events."""
    return schema_of(control.commands, (*EVENTS, *JOB_EVENTS))


async def query_command_line_options(control: Control, arguments: CommandLineOptions) -> list[CommandLineOption]:
    """Libvirt asks; options of QEMU's are none of this server's."""
    if arguments.option is not None:
        raise QmpError(f"invalid option name: {arguments.option}")
    return []


async def quit_(control: Control, arguments: Nothing) -> None:
    """End the server as SIGTERM does; the reply is sent before."""
    control.quit()


COMMANDS: Final = (
    Command("qmp_capabilities", qmp_capabilities, Capabilities),
    Command("query-version", query_version, returns=VersionInfo),
    Command("query-commands", query_commands, returns=list[CommandInfo]),
    Command("query-events", query_events, returns=list[CommandInfo]),
    Command("query-qmp-schema", query_qmp_schema, returns=list[SchemaInfo]),
    Command(
        "query-command-line-options",
        query_command_line_options,
        CommandLineOptions,
        list[CommandLineOption],
    ),
    Command("quit", quit_),
)
