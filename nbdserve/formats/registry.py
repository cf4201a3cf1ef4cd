"""The image formats there are. A driver is imported when it is asked for: all of them take 0.3 s."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver

_PLACES: Final = {
    "raw": "nbdserve.formats.raw:RawDriver",
    "parallels": "nbdserve.formats.parallels.driver:ParallelsDriver",
    "qcow": "nbdserve.formats.qcow.driver:QcowDriver",
    "qcow2": "nbdserve.formats.qcow2.driver:Qcow2Driver",
    "qed": "nbdserve.formats.qed.driver:QedDriver",
    "raw-cow": "nbdserve.formats.raw_cow.driver:RawCowDriver",
    "cloop": "nbdserve.formats.cloop:CloopDriver",
    "bochs": "nbdserve.formats.bochs:BochsDriver",
    "dmg": "nbdserve.formats.dmg.driver:DmgDriver",
    "vdi": "nbdserve.formats.vdi.driver:VdiDriver",
    "vmdk": "nbdserve.formats.vmdk.driver:VmdkDriver",
    "vhdx": "nbdserve.formats.vhdx.driver:VhdxDriver",
    "vpc": "nbdserve.formats.vpc.driver:VpcDriver",
    "luks": "nbdserve.formats.luks.driver:LuksDriver",
}


class _Drivers(MutableMapping[str, type[FormatDriver]]):
    """The driver classes by name, of which the names are known without importing them."""

    def __init__(self) -> None:
        self._known: dict[str, type[FormatDriver] | str] = dict(_PLACES)

    def __getitem__(self, name: str) -> type[FormatDriver]:
        found = self._known[name]
        if isinstance(found, str):
            module, _, driver = found.partition(":")
            found = self._known[name] = getattr(import_module(module), driver)
        return found

    def __setitem__(self, name: str, driver: type[FormatDriver]) -> None:
        self._known[name] = driver

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


DRIVERS: Final[MutableMapping[str, type[FormatDriver]]] = _Drivers()
"""By QEMU's format names."""


def driver_for(name: str, path: str = "") -> type[FormatDriver]:
    """The driver of the format ``name``; ConfigError, which names the image ``path``, when there is none."""
    try:
        return DRIVERS[name]
    except KeyError:
        known = ", ".join(sorted(DRIVERS))
        of = f"{path}: " if path else ""
        raise ConfigError(f"{of}unknown image format {name!r}: give one of {known}") from None
