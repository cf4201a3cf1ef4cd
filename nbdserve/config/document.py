"""The annotated configuration file, ``config/nbdserve.toml``: every option, commented out, at its default.

``python -m nbdserve.config.document`` prints it.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nbdserve.config.models import AdminOptions, ExportOptions, ServerOptions

_HEAD = """\
# nbdserve configuration: nbdserve serve -c nbdserve.toml
#
# Every option is here, commented out, at its default. Relative paths are taken from the directory of this file.
"""

_EXPORTS_HEAD = """\
# One table for each export; NAME is what clients ask for, as in nbd://localhost/NAME.
#[exports.NAME]
"""


def render() -> str:
    """The text of the file."""
    tables = [
        f"{_HEAD}\n[server]\n{_options(ServerOptions)}",
        f"[admin]\n{_options(AdminOptions)}",
        f"{_EXPORTS_HEAD}{_options(ExportOptions)}",
    ]
    return "\n".join(tables)


def _options(model: type[BaseModel]) -> str:
    return "\n".join(_option(name, field) for name, field in model.model_fields.items())


def _option(name: str, field: FieldInfo) -> str:
    help_ = field.description or ""
    if field.default is None:
        help_ += " Absent by default; for example:"
    comment = textwrap.fill(help_, 116, initial_indent="# ", subsequent_indent="# ")
    value = field.examples[0] if field.examples and field.default in (None, PydanticUndefined) else field.default
    return f"{comment}\n#{name} = {_toml(value)}\n"


def _toml(value: Any) -> str:
    """A TOML value; JSON writes strings, numbers, booleans and lists of them the same way."""
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    print(render(), end="")
