"""raw: one shape."""

from __future__ import annotations

from nbdserve.units import MIB
from tests.support.geometries.geometry import Geometry, Kit

KIT = Kit("raw", (Geometry("raw", 1 * MIB, "raw"),))
