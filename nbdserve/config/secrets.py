"""Passphrases of encrypted images: from a file or from the environment, never in plain text on a command line.

Every user of the machine can read the arguments of a process; its environment and a file of mode 0600 only their owner.
The bytes of a file all count, a newline at its end too, as for QEMU and ``cryptsetup --key-file``.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from nbdserve.errors import ConfigError

Opener: TypeAlias = Callable[[str, int], int]
"""From a name and flags of open(2) to a descriptor."""

MAX_SECRET_BYTES: Final = 64 * 1024
"""More than any passphrase; a wrong file name (``/dev/zero``) ends here."""


def secret_from_file(path: str, opener: Opener | None = None) -> bytes:
    """All bytes of the file, which may also be a pipe. ConfigError, naming it, when it cannot be one.

    ``opener`` opens it in the place of open(2).
    """
    try:
        with open(path, "rb", opener=opener) as file:
            secret = file.read(MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the secret: {getattr(error, 'strerror', None) or error}") from None
    return _checked(secret, path)


def secret_from_environment(name: str) -> bytes:
    """The value of an environment variable. ConfigError when there is none."""
    value = os.environb.get(os.fsencode(name))
    if value is None:
        raise ConfigError(f"the environment variable {name!r}, which should hold the secret, is not set")
    return _checked(value, f"environment variable {name!r}")


def _checked(secret: bytes, source: str) -> bytes:
    if not secret:
        raise ConfigError(f"{source}: the secret is empty")
    if len(secret) > MAX_SECRET_BYTES:
        raise ConfigError(f"{source}: a secret has at most {MAX_SECRET_BYTES} bytes")
    return secret


def chosen_secret(file: str | None, variable: str | None, opener: Opener | None = None) -> bytes | None:
    """The secret of the options ``secret_file`` and ``secret_env``, of which at most one may be given."""
    if file and variable:
        raise ConfigError("the secret is either in a file or in an environment variable, and both are given")
    if file:
        return secret_from_file(file, opener)
    return secret_from_environment(variable) if variable else None


def secrets_of_objects(texts: Iterable[str]) -> dict[str, bytes]:
    """The secrets of QEMU's ``--object secret,id=ID,file=PATH[,format=raw|base64]``, by id.

    ``env=NAME`` in the place of ``file`` reads the environment. An object may be JSON, as QEMU takes it. ConfigError
    for any other object, for a secret in plain text (``data=``) and for one that is encrypted itself.
    """
    secrets: dict[str, bytes] = {}
    for text in texts:
        shown = text.partition("data")[0]  # what is refused is not repeated in a log
        try:
            name, secret = _secret(_properties(text))
        except ConfigError as error:
            raise ConfigError(f"--object {shown}: {error}") from None
        if name in secrets:
            raise ConfigError(f"--object {shown}: there is a secret of the id {name!r} already")
        secrets[name] = secret
    return secrets


def secret_of_object(properties: Mapping[str, str], opener: Opener | None = None) -> bytes:
    """The secret that the properties of one such object describe. ConfigError as above, and what ``opener`` raises."""
    return _secret(dict(properties), opener)[1]


def _properties(text: str) -> dict[str, str]:
    if text.startswith("{"):
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"not valid JSON: {error}") from None
        except RecursionError:
            raise ConfigError("nested too deeply") from None
        if not isinstance(tree, dict):
            raise ConfigError("the JSON value is no object")
        return {str(key): str(value) for key, value in tree.items()}
    kind, *items = text.replace(",,", "\0").split(",")
    properties = {"qom-type": kind.removeprefix("qom-type=")}
    for item in items:
        key, separator, value = item.replace("\0", ",").partition("=")
        if not separator or not key:
            raise ConfigError(f"{key!r} is no property=value")
        if key in properties:
            raise ConfigError(f"property {key!r} is given twice")
        properties[key] = value
    return properties


def _secret(properties: dict[str, str], opener: Opener | None = None) -> tuple[str, bytes]:
    kind = properties.pop("qom-type", "")
    if kind != "secret":
        what = "TLS is" if kind.startswith("tls-") else f"objects of the type {kind!r} are"
        raise ConfigError(f"{what} not supported yet")
    if "data" in properties:
        raise ConfigError("data= would show the secret to every user of this machine; put it in a file and give file=")
    for property_ in ("keyid", "iv"):
        if property_ in properties:
            raise ConfigError(f"{property_}=: secrets that are encrypted themselves are not supported")
    name, file, variable = (properties.pop(key, None) for key in ("id", "file", "env"))
    form = properties.pop("format", "raw")
    if properties:
        raise ConfigError(f"unknown property {next(iter(properties))!r}")
    if not name:
        raise ConfigError("id= is missing")
    secret = chosen_secret(file, variable, opener)
    if secret is None:
        raise ConfigError("file= is missing")
    return name, _decoded(secret, form)


def _decoded(secret: bytes, form: str) -> bytes:
    if form == "raw":
        return secret
    if form != "base64":
        raise ConfigError(f"format={form}: give raw or base64")
    try:
        return base64.b64decode(b"".join(secret.split()), validate=True)
    except binascii.Error as error:
        raise ConfigError(f"the secret is no base64: {error}") from None


def named_secret(secrets: Mapping[str, bytes], name: Any, option: str) -> bytes:
    """The secret of the id ``name``, which the option called ``option`` gives."""
    if not isinstance(name, str) or name not in secrets:
        raise ConfigError(
            f"option {option!r}: there is no secret of the id {name!r}; give --object secret,id={name},file="
        )
    return secrets[name]
