"""What is raised for a command line that cannot be understood (exit code 2)."""

from __future__ import annotations

from typing import Any, Final

import typer

UsageError: Final[Any] = typer.BadParameter.__base__
"""click's class, which typer has in a place of its own from one release to the next."""
