"""Reading a configuration file."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nbdserve.config.models import Config
from nbdserve.errors import ConfigError


def load(path: str) -> Config:
    """The configuration in the TOML file at ``path``.

    ConfigError names the file and, for every mistake in it, the table, the key and the value.
    """
    file = Path(path)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None
    try:
        return Config.model_validate(document, context={"directory": str(file.absolute().parent)})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_mistake(detail)}" for detail in error.errors())) from None


def _mistake(detail: ErrorDetails) -> str:
    *tables, key = (name for name in detail["loc"] if isinstance(name, str))
    where = f"[{'.'.join(tables)}] " if tables else ""
    if detail["type"] == "extra_forbidden":
        kind = "table" if isinstance(detail["input"], dict) else "option"
        return f"{where}{key}: unknown {kind}{_near(tables, key)}"
    if detail["type"] == "missing":
        return f"{where}{key}: missing"
    if detail["type"] in ("dict_type", "model_type"):
        return f"{where}{key} = {detail['input']!r}: a table is expected, [{'.'.join([*tables, key])}]"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict):
        return f"[{'.'.join([*tables, key])}] {message}"
    return f"{where}{key} = {detail['input']!r}: {message}"


def _near(tables: list[str], key: str) -> str:
    model: Any = Config
    for table in tables:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[table].annotation
        else:
            model = get_args(model)[1]
    matches = difflib.get_close_matches(key, list(model.model_fields))
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
