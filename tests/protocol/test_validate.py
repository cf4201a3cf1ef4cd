from __future__ import annotations

import struct

import pytest

from nbdserve.errors import RequestError
from nbdserve.protocol import constants as k
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.validate import MAX_STATUS_PAYLOAD, RequestRules, status_payload

SIZE = 1 << 30
OFFERED = 0x0FFF & ~k.EXPORT_READ_ONLY & ~k.EXPORT_SEND_RESIZE
EINVAL, ENOSPC, EPERM, EOVERFLOW = k.NBD_EINVAL, k.NBD_ENOSPC, k.NBD_EPERM, k.NBD_EOVERFLOW


def rules(size: int = SIZE, flags: int = OFFERED, mode: int = STRUCTURED, contexts: bool = True) -> RequestRules:
    return RequestRules(size, flags, mode, contexts)


RANGED = {
    k.CMD_READ: EINVAL,
    k.CMD_WRITE: ENOSPC,
    k.CMD_TRIM: EINVAL,
    k.CMD_CACHE: EINVAL,
    k.CMD_WRITE_ZEROES: ENOSPC,
    k.CMD_BLOCK_STATUS: EINVAL,
}


@pytest.mark.parametrize(("command", "past_end"), RANGED.items())
def test_the_end_of_the_export(command: int, past_end: int) -> None:
    check = rules().check
    assert check(command, 0, SIZE - 512, 512) == 0
    assert check(command, 0, SIZE - 1, 1) == 0
    for offset, length in [
        (SIZE - 511, 512),
        (SIZE, 1),
        (0, SIZE + 1),
        (1 << 63, 512),
        ((1 << 64) - 512, 512),
        ((1 << 64) - 1, 2),
    ]:
        assert check(command, 0, offset, length) == past_end


@pytest.mark.parametrize("command", RANGED)
def test_zero_length(command: int) -> None:
    expected = EINVAL if command == k.CMD_BLOCK_STATUS else 0
    assert rules().check(command, 0, 0, 0) == expected
    assert rules().check(command, 0, SIZE, 0) == expected
    assert rules().check(command, 0, SIZE + 1, 0) == RANGED[command]


def test_longest_payloads() -> None:
    check = rules(size=1 << 40, mode=EXTENDED).check
    for command, error in [(k.CMD_READ, EOVERFLOW), (k.CMD_WRITE, EINVAL)]:
        assert check(command, 0, 0, k.MAX_PAYLOAD) == 0
        assert check(command, 0, 0, k.MAX_PAYLOAD + 1) == error
        assert check(command, 0, 0, 0xFFFFFFFF) == error
    for command in (k.CMD_TRIM, k.CMD_WRITE_ZEROES, k.CMD_CACHE, k.CMD_BLOCK_STATUS):
        assert check(command, 0, 0, 1 << 40) == 0


ALLOWED = {
    k.CMD_READ: {k.CMD_FLAG_FUA, k.CMD_FLAG_DF},
    k.CMD_WRITE: {k.CMD_FLAG_FUA},
    k.CMD_FLUSH: {k.CMD_FLAG_FUA},
    k.CMD_TRIM: {k.CMD_FLAG_FUA},
    k.CMD_CACHE: {k.CMD_FLAG_FUA},
    k.CMD_WRITE_ZEROES: {k.CMD_FLAG_FUA, k.CMD_FLAG_NO_HOLE, k.CMD_FLAG_FAST_ZERO},
    k.CMD_BLOCK_STATUS: {k.CMD_FLAG_FUA, k.CMD_FLAG_REQ_ONE},
}


@pytest.mark.parametrize("command", ALLOWED)
@pytest.mark.parametrize("bit", range(16))
def test_every_flag_of_every_command_everything_offered(command: int, bit: int) -> None:
    flag = 1 << bit
    assert rules().check(command, flag, 0, 512) == (0 if flag in ALLOWED[command] else EINVAL)


@pytest.mark.parametrize("command", ALLOWED)
@pytest.mark.parametrize("bit", range(16))
def test_every_flag_of_every_command_nothing_offered(command: int, bit: int) -> None:
    check = rules(flags=k.EXPORT_HAS_FLAGS, mode=SIMPLE, contexts=False).check
    assert check(command, 1 << bit, 0, 512) == EINVAL


def test_commands_that_are_not_offered() -> None:
    check = rules(flags=k.EXPORT_HAS_FLAGS, mode=SIMPLE, contexts=False).check
    for command in (k.CMD_FLUSH, k.CMD_TRIM, k.CMD_WRITE_ZEROES, k.CMD_BLOCK_STATUS):
        assert check(command, 0, 0, 512) == EINVAL
    # always there, and CACHE because older clients do not look at its flag
    for command in (k.CMD_READ, k.CMD_WRITE, k.CMD_CACHE):
        assert check(command, 0, 0, 512) == 0


@pytest.mark.parametrize("command", [k.CMD_RESIZE, 9, 10, 255, 0x7FFF, 0xFFFF])
def test_unknown_commands_and_resize(command: int) -> None:
    for flags in (0, 1, 0xFFFF):
        assert rules().check(command, flags, 0, 0) == EINVAL
        assert rules(flags=0xFFFF, mode=EXTENDED).check(command, flags, 0, 512) == EINVAL


def test_read_only() -> None:
    check = rules(flags=k.EXPORT_HAS_FLAGS | k.EXPORT_READ_ONLY | k.EXPORT_SEND_FLUSH).check
    for command in (k.CMD_WRITE, k.CMD_TRIM, k.CMD_WRITE_ZEROES):
        assert check(command, 0, 0, 512) == EPERM
        assert check(command, 0, SIZE, 512) == EPERM
        assert check(command, 0x8000, 0, 512) == EINVAL
    assert check(k.CMD_READ, 0, 0, 512) == 0
    assert check(k.CMD_FLUSH, 0, 0, 0) == 0


def test_flush_and_disconnect_ignore_their_range() -> None:
    for command in (k.CMD_FLUSH, k.CMD_DISC):
        assert rules().check(command, 0, (1 << 64) - 1, 0xFFFFFFFF) == 0
    assert rules().check(k.CMD_DISC, 0xFFFF & ~k.CMD_FLAG_PAYLOAD_LEN, 0, 0) == 0


def test_block_status_needs_a_context() -> None:
    assert rules(contexts=False).check(k.CMD_BLOCK_STATUS, 0, 0, 512) == EINVAL


def test_payload_len() -> None:
    flag = k.CMD_FLAG_PAYLOAD_LEN
    with_payload = rules(flags=OFFERED | k.EXPORT_BLOCK_STATUS_PAYLOAD, mode=EXTENDED).check
    for command in range(10):
        expected = 0 if command in (k.CMD_WRITE, k.CMD_BLOCK_STATUS) else EINVAL
        assert with_payload(command, flag, 0, 512) == expected
    # WRITE without it is taken, too, as QEMU does
    assert with_payload(k.CMD_WRITE, 0, 0, 512) == 0
    # the range of a filtered BLOCK_STATUS is in its payload, so only the payload's length is looked at
    assert with_payload(k.CMD_BLOCK_STATUS, flag | k.CMD_FLAG_REQ_ONE, SIZE, 12) == 0
    assert with_payload(k.CMD_BLOCK_STATUS, flag | k.CMD_FLAG_DF, 0, 12) == EINVAL
    assert with_payload(k.CMD_BLOCK_STATUS, flag, 0, MAX_STATUS_PAYLOAD) == 0
    assert with_payload(k.CMD_BLOCK_STATUS, flag, 0, MAX_STATUS_PAYLOAD + 1) == EINVAL
    assert rules(mode=EXTENDED).check(k.CMD_BLOCK_STATUS, flag, 0, 12) == EINVAL
    assert rules(mode=EXTENDED, contexts=False).check(k.CMD_BLOCK_STATUS, flag, 0, 12) == EINVAL
    assert rules(mode=STRUCTURED).check(k.CMD_WRITE, flag, 0, 512) == EINVAL


def test_status_payload() -> None:
    assert status_payload(struct.pack(">QII", 1 << 40, 3, 1), {1, 2, 3}) == (1 << 40, (3, 1))
    assert status_payload(memoryview(struct.pack(">QI", 5, 1)), [1]) == (5, (1,))


@pytest.mark.parametrize(
    "payload",
    [b"", bytes(7), bytes(8), bytes(11), bytes(13), struct.pack(">QII", 1, 1, 1), struct.pack(">QII", 1, 1, 9)],
)
def test_status_payloads_that_are_refused(payload: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        status_payload(payload, {1, 2})
    assert caught.value.errno == EINVAL
