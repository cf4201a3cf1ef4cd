from typing import Any

from nbdserve.admin.events import BLOCK_EXPORT_DELETED, STOP, Events, ExportDeleted


def test_everyone_is_told_until_they_leave() -> None:
    events = Events(lambda: 12.25)
    first: list[Any] = []
    second: list[Any] = []
    events.subscribe(first.append)
    events.subscribe(second.append)
    events.emit(BLOCK_EXPORT_DELETED, ExportDeleted(id="e1"))
    events.unsubscribe(second.append)
    events.unsubscribe(second.append)
    events.emit(STOP)
    stamp = {"seconds": 12, "microseconds": 250_000}
    deleted = {"timestamp": stamp, "event": "BLOCK_EXPORT_DELETED", "data": {"id": "e1"}}
    assert first == [deleted, {"timestamp": stamp, "event": "STOP"}]
    assert second == [deleted]
