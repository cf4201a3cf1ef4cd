"""The options of a LUKS volume that is made; ``create`` is what they mean."""

from __future__ import annotations

from typing import Final

from nbdserve.formats.base import CreateOption

VOLUME_OPTIONS: Final = (
    CreateOption("cipher-alg", "Name of encryption cipher algorithm (aes-128, aes-192, aes-256)", "aes-256"),
    CreateOption("cipher-mode", "Name of encryption cipher mode (xts, cbc)", "xts"),
    CreateOption("hash-alg", "Name of encryption hash algorithm", "sha256"),
    CreateOption("iter-time", "Time to spend in PBKDF in milliseconds", "2000"),
    CreateOption("ivgen-alg", "Name of IV generator algorithm (plain, plain64, essiv)", "plain64"),
    CreateOption("ivgen-hash-alg", "Name of IV generator hash algorithm (for essiv)", "sha256"),
    CreateOption("key-secret", "ID of the secret that provides the keyslot passphrase"),
)
