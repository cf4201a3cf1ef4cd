"""Arguments of verbs as people write them: ``node-name=disk size=1048576 file.driver=file``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nbdserve.errors import ConfigError


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """``name=value`` words as an object. A value is JSON where it is valid JSON, and else a string.

    A dot in a name leads into an object. A word that is a JSON object itself has several arguments.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        if word.startswith("{"):
            arguments |= _object(word)
            continue
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{word!r} is no argument: write name=value")
        *outer, last = name.split(".")
        place = arguments
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{name!r} contradicts {part!r}, which has a value already")
        if last in place:
            raise ConfigError(f"{name!r} is given twice")
        place[last] = _value(text)
    return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _object(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except ValueError as error:
        raise ConfigError(f"{word!r}: not valid JSON: {error}") from None
    assert isinstance(value, dict)
    return value
