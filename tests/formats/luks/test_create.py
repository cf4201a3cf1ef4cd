"""New volumes: what the options say, and that QEMU takes them."""

from __future__ import annotations

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.luks.create import (
    MAX_ITER_TIME_MS,
    new_volume,
    parse_volume_options,
    passphrase,
)
from nbdserve.formats.luks.keys import iterations_per_second
from nbdserve.formats.luks.layout import CipherSpec, Header
from nbdserve.formats.luks.options import VOLUME_OPTIONS


def test_the_defaults_are_qemus() -> None:
    options = parse_volume_options({})
    assert options.cipher == CipherSpec("xts", "plain64", None, 64)
    assert (options.hash, options.iter_time_ms) == ("sha256", 2000)
    assert {option.name for option in VOLUME_OPTIONS} == {
        "cipher-alg", "cipher-mode", "hash-alg", "iter-time", "ivgen-alg", "ivgen-hash-alg", "key-secret",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"cipher-alg": "aes-128"}, CipherSpec("xts", "plain64", None, 32)),
        ({"cipher-mode": "cbc", "ivgen-alg": "plain"}, CipherSpec("cbc", "plain", None, 32)),
        ({"cipher-mode": "cbc", "ivgen-alg": "essiv"}, CipherSpec("cbc", "essiv", "sha256", 32)),
        ({"cipher-alg": "aes-192", "ivgen-hash-alg": "md5"}, CipherSpec("xts", "plain64", None, 48)),
        (
            {"cipher-alg": "aes-192", "ivgen-alg": "essiv", "ivgen-hash-alg": "md5"},
            CipherSpec("xts", "essiv", "md5", 48),
        ),
    ],
)
def test_ciphers(options: dict[str, str], spec: CipherSpec) -> None:
    assert parse_volume_options(options).cipher == spec


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cipher-alg": "serpent-256"}, "cipher-alg=serpent-256"),
        ({"cipher-mode": "ecb"}, "cipher-mode=ecb"),
        ({"cipher-alg": "aes-192", "cipher-mode": "cbc"}, "QEMU cannot open"),
        ({"ivgen-alg": "benbi"}, "ivgen-alg=benbi"),
        ({"ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"}, "20 bytes is no AES key"),
        ({"hash-alg": "whirlpool"}, "hash-alg=whirlpool"),
        ({"iter-time": "-1"}, "iter-time=-1"),
        ({"iter-time": "x"}, "iter-time=x"),
        ({"iter-time": str(MAX_ITER_TIME_MS + 1)}, "iter-time="),
        ({"iter-time": "9" * 5000}, "iter-time="),
    ],
)
def test_bad_options(options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_volume_options(options)


def test_passphrases() -> None:
    assert passphrase("Schlüssel".encode()) == b"Schl\xc3\xbcssel"
    for secret in (None, b"\xff\xfe"):
        with pytest.raises(ConfigError, match="secret"):
            passphrase(secret)


async def test_iterations_fit_the_time() -> None:
    header, pieces = await new_volume(parse_volume_options({"iter-time": "0"}), b"x")
    assert (header.slots[0].iterations, header.digest_iterations) == (1000, 1000)
    assert [offset for offset, _ in pieces] == [0, header.slots[0].offset]
    assert Header.parse(pieces[0][1], "", 1 << 30) == header
    assert [slot.active for slot in header.slots] == [True] + [False] * 7
    header, _ = await new_volume(parse_volume_options({"iter-time": "100"}), b"x")
    speed = iterations_per_second("sha256")
    assert header.slots[0].iterations == int(speed * 0.1 / 2)
    assert header.digest_iterations == int(speed * 0.1 / 8)
