"""Naming another parent in a descriptor that stays where it is, in steps that a crash may come between. No I/O.

A disk writes a sector as a whole or not at all, so a change of one sector needs no more than that. One of several goes
through a short form of the old text, which fills the first sector with what it takes to open the image and ends there:
behind it the new text can be written unseen, and its first sector puts it in force.
"""

from __future__ import annotations

import re
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.vmdk.descriptor import MAX_NAME, SIGNATURE
from nbdserve.units import SECTOR_SIZE, align_up

_HINT: Final = re.compile(rb"^[ \t]*parentFileNameHint[ \t]*=[^\r\n]*(\r?\n)?", re.MULTILINE | re.IGNORECASE)
_PARENT_CID: Final = re.compile(rb"^([ \t]*parentCID[ \t]*=[ \t]*)([0-9a-fA-F]*)", re.MULTILINE | re.IGNORECASE)
_CID_LINE: Final = re.compile(rb"^[ \t]*CID[ \t]*=[^\r\n]*(\r?\n)?", re.MULTILINE | re.IGNORECASE)
_CREATE_TYPE: Final = re.compile(rb"^[ \t]*createType[ \t]*=[^\r\n]*(\r?\n)?", re.MULTILINE | re.IGNORECASE)

Step = tuple[int, bytes]
"""Bytes and where in the descriptor they belong; stable before the next step."""


def plan_parent(text: bytes, room: int, name: str | None, parent_cid: int) -> tuple[bytes, list[Step]]:
    """The descriptor ``text`` with another parent, or none, and the steps that make it so in ``room`` bytes.

    The image has its old parent until the last step, and the new one from then on. ConfigError: the descriptor cannot
    say it, or there is no such way.
    """
    line = b"" if name is None else _line(name)
    new = _with_parent(text, line, parent_cid)
    if len(new) > room:
        raise ConfigError(f"the descriptor would have {len(new)} bytes, there is room for {room}: use a shorter name")
    steps = _steps(text, new)
    if steps is None and (kept := _in_place(text, line, parent_cid)) is not None:
        new, steps = kept, _steps(text, kept)
    if steps is None:
        raise ConfigError(
            f"a parent's name of {len(line)} bytes cannot be written in a way that a crash does not harm: the extents "
            "and the name in use leave no room in the first sector of the descriptor; use a shorter name"
        )
    return new, steps


def _line(name: str) -> bytes:
    stored = name.encode("utf-8", "surrogateescape")
    if any(character in name for character in '"\r\n\0') or len(stored) > MAX_NAME:
        raise ConfigError(f"{name!r} cannot be written into a VMDK descriptor")
    return b'parentFileNameHint="' + stored + b'"\n'


def _with_parent(text: bytes, line: bytes, parent_cid: int) -> bytes:
    """``text`` with nothing else changed; everything behind the line moves."""
    text = _with_parent_cid(text, parent_cid)
    found = _HINT.search(text)
    if found is not None:
        return text[: found.start()] + line + text[found.end() :]
    if not line:
        return text
    before = _CREATE_TYPE.search(text) or _PARENT_CID.search(text)
    assert before is not None
    end = text.find(b"\n", before.start()) + 1 or len(text)
    return text[:end] + line + text[end:]


def _with_parent_cid(text: bytes, parent_cid: int) -> bytes:
    """The ID is behind that of the image, for QEMU drops what is between them when it writes."""
    digits = f"{parent_cid:08x}".encode()
    found = _PARENT_CID.search(text)
    if found is not None:
        digits = f"{parent_cid:0{len(found[2])}x}".encode()  # others write fewer, and nothing moves if they suffice
        return text[: found.start(2)] + digits + text[found.end(2) :]
    own = _CID_LINE.search(text)
    if own is None or not own[1]:
        raise ConfigError("the descriptor has no content ID: it cannot name a parent")
    return text[: own.end()] + b"parentCID=" + digits + b"\n" + text[own.end() :]


def _in_place(text: bytes, line: bytes, parent_cid: int) -> bytes | None:
    """``text`` with a line not longer than the old one in its place, so that nothing moves; None if that cannot be.

    What is left of the old line in the sector becomes a comment, which goes on to the line's end in the next one.
    """
    changed = _with_parent_cid(text, parent_cid)
    found = _HINT.search(changed)
    if found is None or len(changed) != len(text) or len(line) > found.end() - found.start():
        return None
    at = found.start() + len(line)
    stop = min(align_up(at + 1, SECTOR_SIZE), found.end() - len(found[1] or b""))
    return changed[: found.start()] + line + b"#" * (stop - at) + changed[max(at, stop) :]


def _steps(old: bytes, new: bytes) -> list[Step] | None:
    length = align_up(max(len(old), len(new)), SECTOR_SIZE)
    before, after = old.ljust(length, b"\0"), new.ljust(length, b"\0")
    sectors = [slice(at, at + SECTOR_SIZE) for at in range(0, length, SECTOR_SIZE)]
    changed = [sector for sector in sectors if before[sector] != after[sector]]
    if len(changed) <= 1:
        return [(sector.start, after[sector]) for sector in changed]
    short = _short_form(old)
    if short is None:
        return None
    return [(0, short.ljust(SECTOR_SIZE, b"\0")), (SECTOR_SIZE, after[SECTOR_SIZE:]), (0, after[:SECTOR_SIZE])]


def _short_form(text: bytes) -> bytes | None:
    """``text`` without comments, and if need be without the disk data base, so that it ends in its first sector."""
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    kept = [line for line in lines if line.startswith(SIGNATURE) or not line.lstrip().startswith(b"#")]
    without_base = [line for line in kept if not line.lstrip().startswith(b"ddb.")]
    for form in (b"".join(kept), b"".join(without_base)):
        if len(form) < SECTOR_SIZE:
            return form
    return None
