"""How results are printed: for people, or as JSON."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any, TypeAlias

import typer


class Output(StrEnum):
    """How results are printed."""

    HUMAN = "human"
    JSON = "json"


OutputOption: TypeAlias = Annotated[Output, typer.Option("--output", help="How to print.")]


def print_json(value: Any) -> None:
    """``value`` as qemu-img lays it out."""
    print(json.dumps(value, indent=4, ensure_ascii=False))
