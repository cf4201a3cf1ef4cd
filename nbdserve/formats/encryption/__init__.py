from __future__ import annotations

from typing import Final

UNLOCK_SECONDS: Final = 60.0
"""Allowed by default to open a LUKS volume: of one processor, for all slots that are tried. Eight slots of two seconds,
on a machine a quarter as fast. Less would lock people out of what QEMU and cryptsetup open, which have no limit."""
