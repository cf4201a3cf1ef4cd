"""The options of a LUKS volume that is made, and of key slots that change; ``create`` and ``key_slots`` know more."""

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
KEY_OPTIONS: Final = (
    CreateOption("iter-time", "Time to spend in PBKDF in milliseconds"),
    CreateOption("keyslot", "Select a single keyslot to modify explicitly"),
    CreateOption("new-secret", "ID of the secret that is to open the volume, too"),
    CreateOption("old-secret", "ID of a secret: select all keyslots that it opens"),
    CreateOption("secret", "ID of a secret that opens the volume now"),
    CreateOption("state", "Select new state of affected keyslots (active/inactive)"),
)
