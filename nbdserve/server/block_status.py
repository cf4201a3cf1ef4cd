"""BLOCK_STATUS: every context of a request answered for one common range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.node import Node
from nbdserve.block.status import Projection, allocation_flags, block_status, depth_values
from nbdserve.errors import RequestError
from nbdserve.protocol.codec import EXTENDED, block_status_chunk
from nbdserve.protocol.constants import CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, MAX_EXTENTS, REPLY_FLAG_DONE
from nbdserve.protocol.meta_contexts import ALLOCATION_DEPTH, BASE_ALLOCATION, Context
from nbdserve.protocol.validate import RequestRules, status_payload

_PROJECTIONS: Final[dict[str, Projection]] = {BASE_ALLOCATION: allocation_flags, ALLOCATION_DEPTH: depth_values}
_LONGEST_32_BIT: Final = (1 << 32) - 4096
"""The longest range described with 32-bit lengths: a multiple of the preferred block, so no extent ends in one."""


async def status_reply(
    node: Node,
    mode: int,
    contexts: Sequence[Context],
    bitmaps: Mapping[str, DirtyBitmap],
    rules: RequestRules,
    flags: int,
    cookie: int,
    offset: int,
    length: int,
    payload: bytes | None,
) -> bytes:
    """The whole reply: one chunk per context, all cut at one common end. ``bitmaps`` are those of the export.

    Clients (virtnbdbackup, KubeVirt) combine the contexts position by position and lose data when one covers less.
    """
    if payload is not None:
        length, wanted = status_payload(payload, [number for number, _ in contexts])
        contexts = [(number, name) for number, name in contexts if number in wanted]
        if error := rules.check(CMD_BLOCK_STATUS, 0, offset, length):
            raise RequestError(error, f"{length} bytes at {offset} are not inside the export")
    if mode != EXTENDED:
        length = min(length, _LONGEST_32_BIT)
    limit = 1 if flags & CMD_FLAG_REQ_ONE else MAX_EXTENTS
    questions = [_PROJECTIONS[name] if name in _PROJECTIONS else bitmaps[name] for _, name in contexts]
    lists = await block_status(node, offset, length, questions, limit)
    chunks = [
        block_status_chunk(mode, REPLY_FLAG_DONE if number == contexts[-1][0] else 0, cookie, offset, number, extents)
        for (number, _), extents in zip(contexts, lists, strict=True)
    ]
    return b"".join(chunks)
