"""The drivers of qcow2 images with the legacy AES encryption."""

from __future__ import annotations

from nbdserve.formats.encryption.guest_sectors import GuestSectorDriver
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.subclusters import SubclusterDriver


class AesDriver(GuestSectorDriver, Qcow2Driver):
    """An image with the legacy encryption."""


class AesSubclusterDriver(GuestSectorDriver, SubclusterDriver):
    """An image with the legacy encryption and extended L2 entries."""
