"""A command, and the answer to it."""

from __future__ import annotations

from typing import Any, TypeAlias

Row: TypeAlias = tuple[str, dict[str, Any], str | None]
"""The command, its arguments, and the description of the error, or None."""
