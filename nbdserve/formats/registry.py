"""The image formats there are."""

from __future__ import annotations

from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.bochs import BochsDriver
from nbdserve.formats.cloop import CloopDriver
from nbdserve.formats.dmg.driver import DmgDriver
from nbdserve.formats.luks.driver import LuksDriver
from nbdserve.formats.parallels.driver import ParallelsDriver
from nbdserve.formats.qcow.driver import QcowDriver
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qed.driver import QedDriver
from nbdserve.formats.raw import RawDriver
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.vdi.driver import VdiDriver
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.formats.vpc.driver import VpcDriver

DRIVERS: Final[dict[str, type[FormatDriver]]] = {
    "raw": RawDriver,
    "parallels": ParallelsDriver,
    "qcow": QcowDriver,
    "qcow2": Qcow2Driver,
    "qed": QedDriver,
    "raw-cow": RawCowDriver,
    "cloop": CloopDriver,
    "bochs": BochsDriver,
    "dmg": DmgDriver,
    "vdi": VdiDriver,
    "vmdk": VmdkDriver,
    "vhdx": VhdxDriver,
    "vpc": VpcDriver,
    "luks": LuksDriver,
}
"""By QEMU's format names."""


def driver_for(name: str, path: str = "") -> type[FormatDriver]:
    """The driver of the format ``name``; ConfigError, which names the image ``path``, when there is none."""
    try:
        return DRIVERS[name]
    except KeyError:
        known = ", ".join(sorted(DRIVERS))
        of = f"{path}: " if path else ""
        raise ConfigError(f"{of}unknown image format {name!r}: give one of {known}") from None
