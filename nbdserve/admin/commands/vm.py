"""What tools for virtual machines ask before they work on disks. There is no machine; the disks are there.

``stop`` and ``cont`` hold the clients' requests back, as a stopped machine makes none.
"""

from __future__ import annotations

from typing import Any, Final

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import DEVICE_NOT_FOUND, QmpError
from nbdserve.admin.schema import AnyValue, Arguments, Int, Nothing, Result
from nbdserve.units import format_size


class StatusInfo(Result):
    """The run state."""

    status: str
    singlestep: bool = False
    running: bool


class NameInfo(Result):
    """The machine's name, of which there is none."""

    name: str | None = None


class UuidInfo(Result):
    """The machine's UUID."""

    UUID: str = "00000000-0000-0000-0000-000000000000"


class TpmInfo(Result):
    """A TPM, of which there is none."""

    id: str


class QomPath(Arguments):
    """Of ``qom-list``."""

    path: str


class QomGet(Arguments):
    """Of ``qom-get``."""

    path: str
    property: str


class QomSet(Arguments):
    """Of ``qom-set``."""

    path: str
    property: str
    value: AnyValue


class PropertyInfo(Result):
    """ObjectPropertyInfo."""

    name: str
    type: str


class HumanCommand(Arguments):
    """Of ``human-monitor-command``."""

    command_line: str
    cpu_index: Int | None = None


async def query_status(control: Control, arguments: Nothing) -> StatusInfo:
    """Running, or paused by ``stop``."""
    running = control.quiesced is None
    return StatusInfo(status="running" if running else "paused", running=running)


async def query_name(control: Control, arguments: Nothing) -> NameInfo:
    """None."""
    return NameInfo()


async def query_uuid(control: Control, arguments: Nothing) -> UuidInfo:
    """What QEMU says of a machine that was given none."""
    return UuidInfo()


async def query_tpm(control: Control, arguments: Nothing) -> list[TpmInfo]:
    """None."""
    return []


async def stop(control: Control, arguments: Nothing) -> None:
    """Finish the requests in flight of every exported disk, and hold new ones back."""
    await control.quiesce()


async def cont(control: Control, arguments: Nothing) -> None:
    """Undo ``stop``."""
    await control.resume()


async def qom_list(control: Control, arguments: QomPath) -> list[PropertyInfo]:
    """The properties of an object."""
    return [PropertyInfo(name=name, type=_type(value)) for name, value in _object(control, arguments.path)[1].items()]


async def qom_get(control: Control, arguments: QomGet) -> Any:
    """One property of an object."""
    kind, properties = _object(control, arguments.path)
    if arguments.property not in properties:
        raise QmpError(f"Property '{kind}.{arguments.property}' not found")
    value = properties[arguments.property]
    return f"{arguments.path.rstrip('/')}/{arguments.property}" if isinstance(value, _Child) else value


async def qom_set(control: Control, arguments: QomSet) -> None:
    """The limits of a throttle group; and the node of a disk may be set to itself, or to a filter that keeps moments of
    it, which is in the way of writes already."""
    found = control.objects.find(arguments.path.removeprefix("/objects/"))
    if found is not None:
        found.set(arguments.property, arguments.value)
        return
    entry = control.device_of(arguments.path.removeprefix("/devices/"))
    if entry is None:
        kind, properties = _object(control, arguments.path)
        if arguments.property in properties:
            raise QmpError(f"Property '{kind}.{arguments.property}' is not writable")
        raise QmpError(f"Property '{kind}.{arguments.property}' not found")
    if arguments.property != "drive":
        raise QmpError(f"Property 'disk.{arguments.property}' not found")
    if not isinstance(arguments.value, str):
        raise QmpError("Invalid parameter type for 'drive', expected: string")
    chosen = control.nodes.either(arguments.value)
    if chosen.node is not entry.node and chosen not in control.nodes.filters_on(entry):
        raise QmpError(f"Node '{chosen.name}' is neither '{entry.name}' nor a filter on it")


class _Child(str):
    """The type of an object below."""


def _type(value: Any) -> str:
    if isinstance(value, _Child):
        return f"child<{value}>"
    return {bool: "bool", int: "int", str: "string"}.get(type(value), "struct")


def _object(control: Control, path: str) -> tuple[str, dict[str, Any]]:
    """The type of an object and its properties."""
    match path.strip("/").split("/"):
        case [""]:
            children = {name: _Child("container") for name in ("objects", "exports", "devices")}
            return "container", {"type": "container"} | children
        case ["objects"]:
            return "container", {"type": "container"} | {each.id: _Child(each.kind) for each in control.objects}
        case ["exports"]:
            return "container", {"type": "container"} | {each.id: _Child("nbd-export") for each in control.exports}
        case ["devices"]:
            return "container", {"type": "container"} | {each.name: _Child("disk") for each in control.devices()}
        case ["objects", name]:
            found = control.objects.find(name)
            if found is not None:
                return found.kind, found.shown()
        case ["exports", name]:
            for export in control.exports:
                if export.id == name:
                    return "nbd-export", {
                        "type": "nbd-export",
                        "name": export.export.name,
                        "node-name": export.entry.name,
                        "read-only": export.export.read_only,
                        "connections": export.export.connections,
                    }
        case ["devices", name] | [name]:
            entry = control.device_of(name)
            if entry is not None:
                return "disk", {"type": "disk", "drive": entry.name, "size": entry.node.size}
    raise QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)


async def human_monitor_command(control: Control, arguments: HumanCommand) -> str:
    """A few of the commands people type at QEMU's other monitor, as text."""
    words = arguments.command_line.split()
    match words:
        case ["info", "block"]:
            return "".join(f"{line}\r\n" for line in _block_lines(control))
        case ["info", "status"]:
            return f"VM status: {'running' if control.quiesced is None else 'paused'}\r\n"
        case ["info", "version"]:
            version = control.version
            return f"{version.qemu.major}.{version.qemu.minor}.{version.qemu.micro}{version.package}\r\n"
        case ["stop"]:
            await control.quiesce()
        case ["cont" | "c"]:
            await control.resume()
        case ["help" | "?", *_]:
            return "info block, info status, info version, stop, cont\r\n"
        case []:
            pass
        case _:
            return f"unknown command: '{arguments.command_line}'\r\n"
    return ""


def _block_lines(control: Control) -> list[str]:
    lines: list[str] = []
    for entry in control.devices():
        node = entry.node
        marks = [entry.driver] + (["read-only"] if node.read_only else [])
        lines.append(f"{entry.name}: {node.path} ({', '.join(marks)})")
        lines.append(f"    Size:             {format_size(node.size)}")
        lines += [f"    Used by:          {user}" for user in entry.users]
        lines += [f"    Backing file:     {layer.path}" for layer in node.layers[1:]]
    return lines


COMMANDS: Final = (
    Command("query-status", query_status, returns=StatusInfo),
    Command("query-name", query_name, returns=NameInfo),
    Command("query-uuid", query_uuid, returns=UuidInfo),
    Command("query-tpm", query_tpm, returns=list[TpmInfo]),
    Command("stop", stop),
    Command("cont", cont),
    Command("qom-list", qom_list, QomPath, list[PropertyInfo]),
    Command("qom-get", qom_get, QomGet, Any),
    Command("qom-set", qom_set, QomSet),
    Command("human-monitor-command", human_monitor_command, HumanCommand, str),
)
