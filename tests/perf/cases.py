"""What is measured, and the ratios that must be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Floor:
    """The bounds of ours / peer; None where the peer does not take part (nbdkit reads no qcow2)."""

    qemu_nbd: float
    nbdkit: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One workload on one kind of image.

    ``unit`` says which way is better: IOPS and MiB/s are rates (a floor is a minimum), ``s`` is a time (a maximum).
    """

    name: str
    image: str
    """raw, qcow2, chain; or the name of another format."""
    floor: Floor
    unit: Literal["IOPS", "MiB/s", "s"]
    pattern: Literal["randread", "read", "randwrite", "nbdcopy"]
    block_size: int = 4096
    depth: int = 16
    fresh: bool = False
    """A new, empty overlay (or image) for every run: the writes allocate, with a flush after every 64 of them."""
    part: int = 1
    """The workload stays in the first 1/``part`` of the disk."""

    @property
    def writes(self) -> bool:
        return self.pattern == "randwrite"

    @property
    def lower_is_better(self) -> bool:
        return self.unit == "s"


K = 1024
M = 1024 * K
CHAIN_TOP_PART = 4
"""The top layer of the chain holds the first quarter of the disk whole, so that overwrites there never allocate."""

CASES: tuple[Case, ...] = (
    Case("raw-randread-4k-qd1", "raw", Floor(1.2, 0.6), "IOPS", "randread", depth=1),
    Case("raw-randread-4k-qd16", "raw", Floor(3.5, 1.3), "IOPS", "randread"),
    Case("raw-randread-4k-qd64", "raw", Floor(2.8, 0.9), "IOPS", "randread", depth=64),
    Case("raw-seqread-256k", "raw", Floor(2.5, 1.3), "MiB/s", "read", block_size=256 * K),
    Case("raw-seqread-1m", "raw", Floor(1.7, 1.3), "MiB/s", "read", block_size=M),
    Case("raw-randwrite-4k-qd16", "raw", Floor(1.3, 1.0), "IOPS", "randwrite"),
    Case("raw-nbdcopy-null", "raw", Floor(0.9, 1.1), "s", "nbdcopy"),
    Case("qcow2-randread-4k-qd16", "qcow2", Floor(2.5), "IOPS", "randread"),
    Case("qcow2-seqread-256k", "qcow2", Floor(1.8), "MiB/s", "read", block_size=256 * K),
    Case("qcow2-overwrite-4k-qd16", "qcow2", Floor(1.3), "IOPS", "randwrite"),
    Case("qcow2-firstwrite-4k-qd16", "qcow2", Floor(1.2), "IOPS", "randwrite", fresh=True),
    Case("chain-randread-4k-qd16", "chain", Floor(2.5), "IOPS", "randread"),
    Case("chain-seqread-256k", "chain", Floor(1.8), "MiB/s", "read", block_size=256 * K),
    Case("chain-overwrite-4k-qd16", "chain", Floor(1.3), "IOPS", "randwrite", part=CHAIN_TOP_PART),
    Case("chain-firstwrite-4k-qd16", "chain", Floor(1.2), "IOPS", "randwrite", fresh=True),
)


def selected(patterns: list[str], cases: Sequence[Case] = CASES) -> list[Case]:
    """Those of ``cases`` whose name contains one of ``patterns``, all without any. ValueError when nothing matches."""
    if not patterns:
        return list(cases)
    chosen = [case for case in cases if any(pattern in case.name for pattern in patterns)]
    if not chosen:
        raise ValueError(f"no case matches {', '.join(patterns)}; there are: {', '.join(case.name for case in cases)}")
    return chosen
