"""How a differencing image names its parent: parent locators, in the forms of Windows and Mac OS.

Names made on Windows have backslashes and drive letters. A path there cannot lead anywhere here, so that of such a
name only its last part is used: the parent is then looked for beside the image.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

from nbdserve.formats.vpc.layout import Locator
from nbdserve.units import SECTOR_SIZE, align_up

MAX_NAME_BYTES: Final = 12288
"""Of a stored name: 4096 bytes of path, percent-encoded."""
_ORDER: Final = (b"W2ru", b"MacX", b"Wi2r", b"W2ku", b"Wi2k")
"""Which form is believed first: relative names are, because images travel together."""
_DRIVE: Final = re.compile(r"[A-Za-z]:")


def preferred(locators: tuple[Locator, ...]) -> list[Locator]:
    """The locators that can be understood, the best first."""
    known = [locator for locator in locators if locator.used and locator.code in _ORDER]
    return sorted(known, key=lambda locator: _ORDER.index(locator.code))


def decode_name(code: bytes, data: bytes) -> str | None:
    """The path in a locator's data, as paths are written here; None when it is not one."""
    try:
        if code == b"MacX":
            return _from_url(data.rstrip(b"\0").decode())
        if code in (b"W2ru", b"W2ku"):
            return portable(data[: len(data) & ~1].decode("utf-16-le").rstrip("\0"))
        return portable(data.decode("latin-1").rstrip("\0"))
    except UnicodeDecodeError:
        return None


def _from_url(url: str) -> str | None:
    """The path of ``file://./name`` or ``file:///name``."""
    scheme, separator, path = url.partition("://")
    if not separator or scheme.lower() != "file":
        return None
    return _without_dot(unquote(path.removeprefix("localhost"), errors="surrogateescape"))


def portable(name: str) -> str | None:
    """A Windows path as it is written here; only the last part of one with a drive or a server."""
    if _DRIVE.match(name) or name.startswith("\\\\"):
        return re.split(r"[\\/]", name)[-1] or None
    return _without_dot(name.replace("\\", "/"))


def _without_dot(name: str) -> str | None:
    """Without a leading ``./``, unless a colon behind it would make it look like a protocol."""
    short = name.removeprefix("./")
    return (name if ":" in short.partition("/")[0] else short) or None


def make_locators(name: str, start: int) -> tuple[tuple[Locator, ...], bytes]:
    """Locators for the parent ``name``, and the sectors with their data that are to be at the host offset ``start``.

    Mac OS has the name in any case (``MacX``), Windows (``W2ru``) if it is relative and can be written there.
    ValueError for a name that is too long.
    """
    url = quote(name.removeprefix("./"), errors="surrogateescape")
    names = [(b"MacX", f"file://{'' if name.startswith('/') else './'}{url}".encode())]
    if not name.startswith("/") and "\\" not in name and name.isprintable():
        names.insert(0, (b"W2ru", (".\\" + name.removeprefix("./").replace("/", "\\")).encode("utf-16-le")))
    locators, stored = [], b""
    for code, data in names:
        if len(data) > MAX_NAME_BYTES:
            raise ValueError(f"the parent's name has {len(name)} characters, which is too long")
        room = align_up(len(data), SECTOR_SIZE)
        locators.append(Locator(code, len(data), start + len(stored), room))
        stored += data.ljust(room, b"\0")
    return tuple(locators), stored
