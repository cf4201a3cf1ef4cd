from __future__ import annotations

import asyncio
import io

from nbdserve.cli.image.stream import StreamTarget


async def test_bytes_leave_in_the_order_of_their_offsets() -> None:
    out = io.BytesIO()
    target = StreamTarget(out)
    late = asyncio.create_task(target.write_all([(6, memoryview(b"last"))]))
    zeroes = asyncio.create_task(target.zero(3, 3))
    await asyncio.sleep(0.01)
    assert out.getvalue() == b""
    await target.write_all([(0, memoryview(b"abc"))])
    await asyncio.gather(late, zeroes)
    assert out.getvalue() == b"abc\0\0\0last"
