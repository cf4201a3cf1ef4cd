"""The other formats: three cases each, with the same floors for all."""

from __future__ import annotations

from dataclasses import dataclass

from tests.perf.cases import CHAIN_TOP_PART, Case, Floor, K


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How ``qemu-img convert`` makes the image: the driver's name, and what ``-o`` says."""

    driver: str
    options: str = ""
    key_option: str = ""
    """The option that names the passphrase of an encrypted image."""


RAW_COW = "raw-cow"
FORMATS: dict[str, ImageFormat] = {
    "qcow": ImageFormat("qcow"),
    "qed": ImageFormat("qed"),
    "vdi": ImageFormat("vdi"),
    "vpc": ImageFormat("vpc", "force_size=on"),
    "vhdx": ImageFormat("vhdx"),
    "vmdk": ImageFormat("vmdk"),
    "parallels": ImageFormat("parallels"),
    RAW_COW: ImageFormat(RAW_COW),
    "luks": ImageFormat("luks", "iter-time=10", "key-secret"),
    "qcow2-luks": ImageFormat("qcow2", "encrypt.format=luks,encrypt.iter-time=10", "encrypt.key-secret"),
}


def format_cases(names: list[str]) -> list[Case]:
    """The cases of these formats, ``all`` for all of them. ValueError for a name that is not known."""
    if "all" in names:
        names = list(FORMATS)
    if unknown := [name for name in names if name not in FORMATS]:
        raise ValueError(f"unknown format {unknown[0]}; there are: {', '.join(FORMATS)}, all")
    return [case for name in names for case in _cases(name)]


def _cases(name: str) -> tuple[Case, ...]:
    part = CHAIN_TOP_PART if name == RAW_COW else 1  # what its own file holds; the rest is the backing file's
    return (
        Case(f"{name}-randread-4k-qd16", name, Floor(2.0), "IOPS", "randread"),
        Case(f"{name}-seqread-256k", name, Floor(1.5), "MiB/s", "read", block_size=256 * K),
        Case(f"{name}-overwrite-4k-qd16", name, Floor(1.5), "IOPS", "randwrite", part=part),
    )
