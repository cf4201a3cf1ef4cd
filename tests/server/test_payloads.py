"""Memory for payloads: taken, kept, given back, and counted all the while."""

from __future__ import annotations

import asyncio

from nbdserve.server.budget import SMALL, Budget
from nbdserve.server.payloads import Buffers, Payloads
from nbdserve.units import MIB


async def test_what_is_taken_counts_until_it_is_given_back() -> None:
    buffers = Buffers(Budget(4 * MIB))
    payloads = Payloads(buffers, lambda: None)
    first = payloads.take(3 * MIB)
    assert first is not None
    assert len(first) == 3 * MIB
    assert buffers.budget.used == 3 * MIB
    payloads.give(first)
    assert buffers.budget.used == 0


async def test_without_room_the_session_is_resumed_when_there_is() -> None:
    buffers, resumed = Buffers(Budget(4 * MIB)), asyncio.Event()
    holder = Payloads(buffers, lambda: None)
    payloads = Payloads(buffers, resumed.set)
    held = holder.take(3 * MIB)
    assert held is not None
    assert payloads.take(2 * MIB) is None
    assert payloads.waiting
    assert payloads.take(2 * MIB) is None  # asked again too early
    holder.give(held)
    await asyncio.wait_for(resumed.wait(), 60)
    taken = payloads.take(2 * MIB)
    assert taken is not None
    assert not payloads.waiting
    assert buffers.budget.used == 2 * MIB


async def test_who_leaves_waits_no_more() -> None:
    buffers = Buffers(Budget(4 * MIB))
    holder, leaver = Payloads(buffers, lambda: None), Payloads(buffers, lambda: None)
    held = holder.take(3 * MIB)
    assert held is not None
    assert leaver.take(2 * MIB) is None
    leaver.withdraw()
    assert not leaver.waiting
    holder.give(held)
    assert buffers.budget.used == 0


async def test_only_what_is_in_the_shared_buffer_is_copied_to_be_kept() -> None:
    buffers = Buffers()
    payloads = Payloads(buffers, lambda: None)
    buffers.receive.data[:4] = b"1234"
    shared = buffers.receive.view[:4]
    kept = payloads.keep(shared)
    buffers.receive.data[:4] = b"abcd"
    assert kept == b"1234"
    assert buffers.budget.used == 4
    payloads.give(shared)  # counts nothing
    assert buffers.budget.used == 4
    payloads.give(kept)
    assert buffers.budget.used == 0
    own = payloads.take(SMALL)
    assert own is not None
    assert payloads.keep(own) is own
