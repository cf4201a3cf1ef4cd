"""Options of ``create`` that mean the same in several formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nbdserve.errors import ConfigError

BOOLEANS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
"""QEMU's words."""


def parse_boolean(options: Mapping[str, str], name: str, default: str = "off") -> bool:
    """The switch ``name``; ConfigError for what is neither on nor off."""
    value = options.get(name, default)
    if value not in BOOLEANS:
        raise ConfigError(f"{name}={value}: expects on or off")
    return BOOLEANS[value]


def parse_backing(options: Mapping[str, str]) -> tuple[str, str] | None:
    """Name and format of the backing file; None without one. ConfigError when one is given without the other."""
    name, fmt = options.get("backing_file") or None, options.get("backing_fmt") or None
    if name is not None and fmt is not None:
        return name, fmt
    if name is not None:
        raise ConfigError("backing_file needs backing_fmt: a backing format is never guessed")
    if fmt is not None:
        raise ConfigError("backing_fmt needs backing_file")
    return None
