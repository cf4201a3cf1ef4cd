"""Sizes in bytes: constants, alignment, and the way users write them.

Everything in nbdserve counts bytes; a name that counts anything else says so (``size_sectors``).
"""

from __future__ import annotations

import re
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

SECTOR_SIZE: Final = 512
"""The unit image headers count in, and the largest write a disk is trusted not to tear."""

_SUFFIXES: Final = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": 1 << 50, "e": 1 << 60}
_SIZE: Final = re.compile(r"(?P<number>\d{1,40}(?:\.\d{1,40})?)(?P<suffix>[bkmgtpe]?)(?:ib)?", re.IGNORECASE)


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of ``alignment`` that is not above ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is not below ``value``."""
    return -(-value // alignment) * alignment


def div_ceil(value: int, divisor: int) -> int:
    """``value / divisor`` rounded up."""
    return -(-value // divisor)


def is_power_of_two(value: int) -> bool:
    """True for 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


def parse_size(text: str) -> int:
    """Bytes of a size written as qemu-img takes it: ``1048576``, ``64K``, ``1.5G`` (powers of 1024).

    Raises ValueError naming the text when it is no size or exceeds 2^63 - 1.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"invalid size {text!r}: give bytes, or a number with one of K, M, G, T, P, E")
    number, factor = match["number"], _SUFFIXES[match["suffix"].lower()]
    size = int(number) * factor if number.isdigit() else int(float(number) * factor)
    if size >= 1 << 63:
        raise ValueError(f"invalid size {text!r}: it must be less than 8 EiB")
    return size


def format_size(size: int) -> str:
    """``size`` bytes for people, as qemu-img prints it: ``64 KiB``, ``1.5 GiB``."""
    value, suffix = float(size), "B"
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024 or suffix == "EiB":
            break
        value /= 1024
    return f"{value:.3g} {suffix}" if value < 1000 else f"{value:.0f} {suffix}"
