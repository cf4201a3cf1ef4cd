"""What a client may ask for, and the exact error for what it may not (spec, "Request types" and "Error values").

Every request passes :meth:`RequestRules.check`, and what passes is inside the export and allowed by its flags.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

from nbdserve.errors import RequestError
from nbdserve.protocol.codec import CONTEXT_ID, EFFECT_LENGTH, EXTENDED
from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_RESIZE,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXPORT_BLOCK_STATUS_PAYLOAD,
    EXPORT_READ_ONLY,
    EXPORT_SEND_DF,
    EXPORT_SEND_FAST_ZERO,
    EXPORT_SEND_FLUSH,
    EXPORT_SEND_FUA,
    EXPORT_SEND_TRIM,
    EXPORT_SEND_WRITE_ZEROES,
    MAX_PAYLOAD,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EOVERFLOW,
    NBD_EPERM,
)

MAX_STATUS_PAYLOAD: Final = 8 + 4 * 4096
"""Longest BLOCK_STATUS payload taken: more ids than any export has contexts."""

_ANY: Final = 1 << 66
"""Above any sum of a 64-bit offset and a 64-bit length."""


class _Rule(NamedTuple):
    """What one command may carry. ``always`` is the error of a command that is refused whatever it carries."""

    refused_flags: int
    end: int = _ANY
    shortest: int = 0
    longest: int = _ANY
    past_end: int = NBD_EINVAL
    too_long: int = NBD_EINVAL
    always: int = 0


def _rules(size: int, flags: int, mode: int, has_contexts: bool) -> list[_Rule]:
    """One rule per command number."""
    fua = CMD_FLAG_FUA if flags & EXPORT_SEND_FUA else 0
    df = CMD_FLAG_DF if flags & EXPORT_SEND_DF else 0
    payload_len = CMD_FLAG_PAYLOAD_LEN if mode == EXTENDED else 0
    zero_flags = fua | CMD_FLAG_NO_HOLE | (CMD_FLAG_FAST_ZERO if flags & EXPORT_SEND_FAST_ZERO else 0)
    read_only = NBD_EPERM if flags & EXPORT_READ_ONLY else 0

    def unless(offered: int) -> int:
        return 0 if offered else NBD_EINVAL

    rules = [_Rule(0, always=NBD_EINVAL)] * (CMD_RESIZE + 1)
    rules[CMD_READ] = _Rule(~(fua | df), size, longest=MAX_PAYLOAD, too_long=NBD_EOVERFLOW)
    rules[CMD_WRITE] = _Rule(~(fua | payload_len), size, longest=MAX_PAYLOAD, past_end=NBD_ENOSPC, always=read_only)
    rules[CMD_DISC] = _Rule(CMD_FLAG_PAYLOAD_LEN)
    # its offset and length are reserved, but QEMU's server ignores them, so clients that leave them set exist
    rules[CMD_FLUSH] = _Rule(~fua, always=unless(flags & EXPORT_SEND_FLUSH))
    rules[CMD_TRIM] = _Rule(~fua, size, always=read_only or unless(flags & EXPORT_SEND_TRIM))
    # older clients send CACHE although it is not advertised
    rules[CMD_CACHE] = _Rule(~fua, size)
    rules[CMD_WRITE_ZEROES] = _Rule(
        ~zero_flags, size, past_end=NBD_ENOSPC, always=read_only or unless(flags & EXPORT_SEND_WRITE_ZEROES)
    )
    rules[CMD_BLOCK_STATUS] = _Rule(~(fua | CMD_FLAG_REQ_ONE), size, shortest=1, always=unless(has_contexts))
    # a range that ends nowhere sends what is always refused the long way
    return [rule._replace(end=-1) if rule.always else rule for rule in rules]


class RequestRules:
    """The rules of one session; ``check`` is called for each request.

    ``size`` is the export's, in bytes; ``flags`` are the transmission flags that were sent to the client; ``mode`` is
    the reply mode; ``has_contexts`` tells whether a metadata context was negotiated.
    """

    __slots__ = ("_rules", "_status_payload")

    def __init__(self, size: int, flags: int, mode: int, has_contexts: bool) -> None:
        self._rules = _rules(size, flags, mode, has_contexts)
        self._status_payload = has_contexts and flags & EXPORT_BLOCK_STATUS_PAYLOAD != 0

    def check(self, command: int, flags: int, offset: int, length: int) -> int:
        """0, or the NBD error that refuses the request (its number is the Linux errno, too).

        For a BLOCK_STATUS with a payload ``length`` is that of the payload; the range it asks for is checked by a
        second call, without the flag, when :func:`status_payload` has taken it apart.
        """
        if command <= CMD_RESIZE:
            refused_flags, end, shortest, longest, _, _, _ = self._rules[command]
            if not flags & refused_flags and shortest <= length <= longest and offset + length <= end:
                return 0
            return self._refusal(command, flags, offset, length)
        return NBD_EINVAL

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> int:
        rule = self._rules[command]
        if command == CMD_BLOCK_STATUS and flags & CMD_FLAG_PAYLOAD_LEN and self._status_payload:
            known_flags = not flags & ~CMD_FLAG_PAYLOAD_LEN & rule.refused_flags
            return 0 if known_flags and length <= MAX_STATUS_PAYLOAD else NBD_EINVAL
        if flags & rule.refused_flags:
            return NBD_EINVAL
        if rule.always:
            return rule.always
        if offset + length > rule.end:
            return rule.past_end
        return rule.too_long if length > rule.longest else NBD_EINVAL


def status_payload(payload: bytes | bytearray | memoryview, negotiated: Collection[int]) -> tuple[int, tuple[int, ...]]:
    """The effect length in bytes and the context ids of a BLOCK_STATUS payload (spec branch, "BLOCK_STATUS payload").

    Raises:
        RequestError: EINVAL: its length is not 8 + n * 4, it names no context, one twice, or one not negotiated.
    """
    size = len(payload)
    if size < EFFECT_LENGTH.size + CONTEXT_ID.size or (size - EFFECT_LENGTH.size) % CONTEXT_ID.size:
        raise RequestError(NBD_EINVAL, f"a block status payload of {size} bytes is not 8 + n * 4, n > 0")
    (length,) = EFFECT_LENGTH.unpack_from(payload)
    ids = tuple(context_id for (context_id,) in CONTEXT_ID.iter_unpack(payload[EFFECT_LENGTH.size :]))
    if len(set(ids)) != len(ids) or not set(ids) <= set(negotiated):
        raise RequestError(NBD_EINVAL, "the block status payload names a context twice, or one that is not negotiated")
    return length, ids
