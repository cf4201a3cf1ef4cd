"""Passphrases that come and go: the key slots of a volume (LUKS On-Disk Format Specification 1.2.3, sections 4.2, 4.4).

A volume can be in use meanwhile: its key stays, and so does its data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.encryption import UNLOCK_SECONDS
from nbdserve.formats.luks import layout
from nbdserve.formats.luks.create import new_slot, parse_iter_time, passphrase
from nbdserve.formats.luks.keys import open_slots, unlock
from nbdserve.formats.luks.layout import KEY_SLOTS, Header, KeySlot
from nbdserve.storage.base import Storage
from nbdserve.storage.pool import worker_pool

_STATE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class SlotChange:
    """A passphrase more (``active``), or the slots of one, or one slot, less."""

    active: bool
    slot: int | None
    new_secret: bytes | None
    old_secret: bytes | None
    secret: bytes | None
    """Opens the volume; None: the one it was opened with."""
    iter_time_ms: int


def parse_slot_change(options: Mapping[str, str], secrets: Mapping[str, bytes], prefix: str = "") -> SlotChange:
    """From options with qemu-img's names, which begin with ``prefix``. ConfigError, in QEMU's words, for a bad one."""
    given = {name.removeprefix(prefix): value for name, value in options.items()}

    def named(name: str) -> bytes | None:
        if name not in given:
            return None
        if given[name] not in secrets:
            raise ConfigError(f"No secret with id '{given[name]}'")
        return secrets[given[name]]

    if "state" not in given:
        raise ConfigError(f"Parameter '{prefix}state' is missing")
    state, number = given["state"], given.get("keyslot")
    if state not in ("active", "inactive"):
        raise ConfigError(f"Parameter '{prefix}state' does not accept value '{state}'")
    if number is not None and not number.removeprefix("-").isdecimal():
        raise ConfigError(f"Parameter '{prefix}keyslot' expects integer")
    active = state == "active"
    if active:
        if "new-secret" not in given:
            raise ConfigError("'new-secret' is required to activate a keyslot")
        if "old-secret" in given:
            raise ConfigError("'old-secret' must not be given when activating keyslots")
    else:
        for name in ("new-secret", "iter-time"):
            if name in given:
                raise ConfigError(f"'{name}' must not be given when erasing keyslots")
    slot = None if number is None else int(number)
    if slot is not None and not 0 <= slot < KEY_SLOTS:
        raise ConfigError(f"Invalid keyslot {slot} specified, must be between 0 and {KEY_SLOTS - 1}")
    if not active and slot is None and "old-secret" not in given:
        raise ConfigError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    return SlotChange(
        active, slot, named("new-secret"), named("old-secret"), named("secret"), parse_iter_time(given.get("iter-time"))
    )


async def change_key_slots(
    storage: Storage, offset: int, room: int, change: SlotChange, *, secret: bytes | None, force: bool
) -> Header:
    """Change the volume whose header is at ``offset`` of ``storage``, in ``room`` bytes; the header as it is then.

    One change at a time. ``secret`` is what the volume was opened with. ``force``: also what nobody may be able to
    open afterwards. ConfigError, in QEMU's words, with nothing changed, for what is refused; ImageError where no slot
    can be opened. Stable on return.
    """
    header = Header.parse(await storage.read(offset, layout.HEADER_BYTES), storage.path, room)
    if change.active:
        return await _activate(storage, offset, header, change, secret=change.secret or secret, force=force)
    for number in await _slots_to_erase(storage, offset, header, change, force=force):
        header = await _erase(storage, offset, header, number)
    return header


async def _activate(
    storage: Storage, offset: int, header: Header, change: SlotChange, *, secret: bytes | None, force: bool
) -> Header:
    number = change.slot
    if number is None:
        number = next((number for number, slot in enumerate(header.slots) if not slot.active), None)
        if number is None:
            raise ConfigError("Can't add a keyslot - all keyslots are in use")
    elif header.slots[number].active and not force:
        raise ConfigError(f"Refusing to overwrite active keyslot {number} - please erase it first")
    if secret is None:
        raise ConfigError("a secret that opens the volume now is needed, to copy its key")
    new_secret = passphrase(change.new_secret)
    key = await unlock(header, storage, offset, secret, UNLOCK_SECONDS)
    at = header.slots[number].offset
    slot, material = await worker_pool().run(
        new_slot, header.cipher, header.hash, key, new_secret, change.iter_time_ms, at
    )
    if header.slots[number].active:
        await _barrier_state(storage, offset, number, active=False)
    await storage.write_stable([(offset + at, material), *_rest_of(slot, offset, number)])
    await _barrier_state(storage, offset, number, active=True)
    return _with_slot(header, number, slot)


async def _slots_to_erase(
    storage: Storage, offset: int, header: Header, change: SlotChange, *, force: bool
) -> list[int]:
    active = [number for number, slot in enumerate(header.slots) if slot.active]
    opened = None
    if change.old_secret is not None:
        found = open_slots(header, storage, offset, change.old_secret, UNLOCK_SECONDS)
        opened = [number async for number, _ in found]
    number = change.slot
    if number is None:
        assert opened is not None
        if not opened:
            raise ConfigError("No keyslots match given (old) password for erase operation")
        if opened == active and not force:
            raise ConfigError(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the "
                "data in the image irreversibly - refusing operation"
            )
        return opened
    if opened is not None and number not in opened:
        raise ConfigError(f"Given keyslot {number} doesn't contain the given old password for erase operation")
    if number not in active and not force:
        raise ConfigError(f"Given keyslot {number} is already erased (inactive) ")
    if active == [number] and not force:
        raise ConfigError(
            f"Attempt to erase the only active keyslot {number} which will erase all the data in the image "
            "irreversibly - refusing operation"
        )
    return [number]


async def _erase(storage: Storage, offset: int, header: Header, number: int) -> Header:
    """The slot is of no use first, and then gone: noise takes the place of its key material."""
    slot = KeySlot(False, 0, bytes(layout.SALT_BYTES), header.slots[number].offset)
    await _barrier_state(storage, offset, number, active=False)
    noise = os.urandom(header.cipher.key_bytes * layout.STRIPES)
    await storage.write_stable([(offset + slot.offset, noise), *_rest_of(slot, offset, number)])
    return _with_slot(header, number, slot)


def _at(offset: int, number: int) -> int:
    """Where a slot is in the header."""
    return offset + layout.SLOTS_AT + number * layout.SLOT_BYTES


def _rest_of(slot: KeySlot, offset: int, number: int) -> list[tuple[int, bytes]]:
    """The slot without its state."""
    return [(_at(offset, number) + _STATE_BYTES, slot.build()[_STATE_BYTES:])]


async def _barrier_state(storage: Storage, offset: int, number: int, *, active: bool) -> None:
    """The state of a slot, four bytes of one sector, between what it is not to be active with and what it is.

    Crash before it is stable: the slot is active or not, and if it is, then with all that belongs to it.
    """
    state = layout.SLOT_ACTIVE if active else layout.SLOT_INACTIVE
    await storage.write_stable([(_at(offset, number), state.to_bytes(_STATE_BYTES, "big"))])


def _with_slot(header: Header, number: int, slot: KeySlot) -> Header:
    return replace(header, slots=(*header.slots[:number], slot, *header.slots[number + 1 :]))
