"""Key slots that change: who can open the volume afterwards, and after every crash on the way."""

from __future__ import annotations

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.luks import layout
from nbdserve.formats.luks.driver import LuksDriver
from nbdserve.formats.luks.key_slots import parse_slot_change
from nbdserve.formats.luks.keys import open_slots
from nbdserve.formats.luks.layout import Header
from nbdserve.storage.base import Storage
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay

SECRETS = {"a": b"first", "b": b"second", "c": b"third"}
FAST = {"iter-time": "0", "cipher-alg": "aes-128"}


async def _volume() -> bytes:
    """One that ``a`` opens."""
    storage = ByteStorage(bytearray())
    await LuksDriver.create(storage, 4096, FAST, secret=SECRETS["a"])
    return bytes(storage.content)


async def _opened_by(storage: Storage, secret: bytes) -> list[int]:
    header = Header.parse(await storage.read(0, layout.HEADER_BYTES), "x", storage.size)
    return [number async for number, _ in open_slots(header, storage, 0, secret, 60)]


async def _change(driver: LuksDriver, *, secret: str = "a", force: bool = False, **options: str) -> None:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    if given["state"] == "active":
        given["iter-time"] = "0"
    await driver.amend_keys(given, SECRETS, secret=SECRETS[secret], force=force)


@pytest.mark.parametrize("slot", ["1", "6", "7"])
async def test_a_crash_locks_nobody_out_and_lets_nobody_in(slot: str) -> None:
    recorder = Recorder(seed=int(slot))
    driver = await LuksDriver.open(recorder.storage(await _volume()), {"secret": b"first"}, read_only=False)
    await _change(driver, state="active", new_secret="b", keyslot=slot)
    added = len(recorder.log)
    await _change(driver, state="inactive", keyslot="0", old_secret="a")
    erased = len(recorder.log)
    seen = set()
    for state in Replay(recorder, None, 1).states(40):
        storage = ByteStorage(state.contents[0])
        header = Header.parse(await storage.read(0, layout.HEADER_BYTES), "x", storage.size)
        found = await _opened_by(storage, b"first"), await _opened_by(storage, b"second")
        seen.add(tuple(map(tuple, found)))
        assert sum(map(len, found)) == sum(each.active for each in header.slots), f"{state}: one opens to nobody"
        assert found[0] or (state.position > added and found[1]), str(state)
    assert erased > added
    assert seen == {((0,), ()), ((0,), (int(slot),)), ((), (int(slot),))}
    await driver.close()


async def test_the_data_stays_and_the_key_material_goes() -> None:
    storage = ByteStorage(bytearray(await _volume()))
    driver = await LuksDriver.open(storage, {"secret": b"first"}, read_only=False)
    await driver.data.write(0, b"x" * 4096)
    await _change(driver, state="active", new_secret="b")
    await _change(driver, state="active", new_secret="b")
    assert await _opened_by(storage, b"second") == [1, 2]
    place = driver.header.slots[1].offset
    before = storage.content[place : place + 4096]
    await _change(driver, state="inactive", old_secret="b")
    assert [slot.active for slot in driver.header.slots] == [True] + 7 * [False]
    assert driver.header == Header.parse(storage.content, "x", len(storage.content))
    after = storage.content[place : place + 4096]
    assert sum(one == other for one, other in zip(before, after, strict=True)) < 100
    await _change(driver, state="active", new_secret="c", keyslot="0", force=True)
    assert (await _opened_by(storage, b"first"), await _opened_by(storage, b"third")) == ([], [0])
    reader = await LuksDriver.open(storage, {"secret": b"third"}, read_only=True)
    assert await reader.data.read(0, 4096) == b"x" * 4096
    await _change(driver, state="inactive", keyslot="0", secret="c", force=True)
    with pytest.raises(ImageError, match="none is in use"):
        await LuksDriver.open(storage, {"secret": b"third"}, read_only=True)


async def test_what_is_refused_changes_nothing() -> None:
    storage = ByteStorage(bytearray(await _volume()))
    driver = await LuksDriver.open(storage, {"secret": b"first"}, read_only=False)
    for _ in range(6):
        await _change(driver, state="active", new_secret="b")
    await _change(driver, state="active", new_secret="c")
    before = bytes(storage.content)
    for options, problem in (
        ({"state": "active", "new_secret": "b"}, "all keyslots are in use"),
        ({"state": "inactive", "keyslot": "7", "old_secret": "b"}, "doesn't contain"),
    ):
        with pytest.raises(ConfigError, match=problem):
            await _change(driver, **options)
    await _change(driver, state="inactive", keyslot="7")
    await _change(driver, state="inactive", keyslot="7", force=True)
    before = bytes(storage.content)
    with pytest.raises(ImageError, match="opens none"):
        await _change(driver, secret="c", state="active", new_secret="b")
    with pytest.raises(ConfigError, match="needed"):
        await driver.amend_keys({"state": "active", "new-secret": "b"}, SECRETS, secret=None)
    assert storage.content == before


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "'encrypt.state' is missing"),
        ({"state": "on"}, "'encrypt.state' does not accept value 'on'"),
        ({"state": "active", "new-secret": "z"}, "No secret with id 'z'"),
        ({"state": "inactive", "keyslot": "x"}, "'encrypt.keyslot' expects integer"),
        ({"state": "inactive", "keyslot": "-1"}, "Invalid keyslot -1"),
        ({"state": "active", "new-secret": "a", "iter-time": "-1"}, "iter-time=-1"),
    ],
)
def test_options(options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_slot_change({f"encrypt.{name}": value for name, value in options.items()}, SECRETS, "encrypt.")
