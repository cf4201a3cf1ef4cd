"""luks: each cipher mode and IV generator, odd sizes. What is not written reads as noise, so all have content."""

from __future__ import annotations

from nbdserve.units import KIB, MIB
from tests.support.geometries.geometry import Field, Geometry, Kit

SECRET = b"a passphrase"
_MADE = "key-secret=s,iter-time=10"


def _geometry(name: str, size: int, options: str = "") -> Geometry:
    options = f"{_MADE},{options}".rstrip(",")
    return Geometry(f"luks-{name}", size, "luks", options=options, own=True, secret=SECRET, noise=True)


_GEOMETRIES = (
    _geometry("xts", 512 * KIB),
    _geometry("tiny", 512, "cipher-alg=aes-128,ivgen-alg=plain"),
    _geometry("cbc", 300 * KIB + 512, "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=plain64"),
    _geometry("essiv", 256 * KIB, "cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha512"),
)

_MORE = (_geometry("large", 24 * MIB),)

_SLOT_AT = 208
_SLOT_SIZE = 48

_FIELDS = (
    Field("version", 6, 2, "big"),
    Field("payload offset sector", 104, 4, "big"),
    Field("key bytes", 108, 4, "big"),
    Field("key iterations", 164, 4, "big"),
    *(
        Field(f"key slot {number} {name}", _SLOT_AT + number * _SLOT_SIZE + at, 4, "big")
        for number in (0, 1, 7)
        for name, at in (("state", 0), ("iterations", 4), ("key material offset", 40), ("stripes", 44))
    ),
)
"""LUKS On-Disk Format Specification 1.2.3, figures 1 and 2."""

KIT = Kit("luks", _GEOMETRIES, _MORE, create=(), fields=_FIELDS)
