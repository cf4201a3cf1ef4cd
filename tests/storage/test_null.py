from nbdserve.extents import ZERO
from nbdserve.storage.null import NullStorage


async def test_it_keeps_nothing() -> None:
    storage = NullStorage(1 << 40)
    assert storage.try_write(0, b"x")
    await storage.write(0, b"x")
    await storage.zero(0, 5)
    await storage.discard(0, 5)
    await storage.flush()
    buffer = bytearray(b"xx")
    assert storage.try_read_into(0, memoryview(buffer))
    assert buffer == b"\0\0"
    assert await storage.read(5, 3) == bytes(3)
    runs = await storage.host_map(0, 100)
    assert list(runs.kind) == [ZERO]
    assert storage.allocated_size() == 0
    await storage.truncate(7)
    assert storage.size == 7
    await storage.close()
