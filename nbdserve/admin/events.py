"""Events: told to every client that has negotiated, in the order they happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel

from nbdserve.admin.schema import Result


@dataclass(frozen=True, slots=True)
class EventType:
    """An event there is, and the model of its ``data``."""

    name: str
    data: type[BaseModel] | None = None


class ExportDeleted(Result):
    """Of BLOCK_EXPORT_DELETED."""

    id: str


class IoError(Result):
    """Of BLOCK_IO_ERROR: a client's request failed, and was told so."""

    device: str
    node_name: str
    operation: Literal["read", "write"]
    action: Literal["report"]
    nospace: bool
    reason: str


class WriteThreshold(Result):
    """Of BLOCK_WRITE_THRESHOLD, in bytes."""

    node_name: str
    amount_exceeded: int
    write_threshold: int


class Shutdown(Result):
    """Of SHUTDOWN."""

    guest: bool
    reason: str


BLOCK_EXPORT_DELETED = EventType("BLOCK_EXPORT_DELETED", ExportDeleted)
BLOCK_IO_ERROR = EventType("BLOCK_IO_ERROR", IoError)
BLOCK_WRITE_THRESHOLD = EventType("BLOCK_WRITE_THRESHOLD", WriteThreshold)
SHUTDOWN = EventType("SHUTDOWN", Shutdown)
STOP = EventType("STOP")
RESUME = EventType("RESUME")

EVENTS: Final = (BLOCK_EXPORT_DELETED, BLOCK_IO_ERROR, BLOCK_WRITE_THRESHOLD, SHUTDOWN, STOP, RESUME)
"""All there are."""


class Events:
    """Whom to tell."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._listeners: list[Callable[[dict[str, Any]], None]] = []

    def subscribe(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """``listener`` is called with each event from here on; it must not raise."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Nothing is told to ``listener`` any more. It need not have subscribed."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def emit(self, event: EventType, data: BaseModel | None = None) -> None:
        """Tell everyone."""
        seconds, rest = divmod(self._clock(), 1)
        message: dict[str, Any] = {
            "timestamp": {"seconds": int(seconds), "microseconds": int(rest * 1_000_000)},
            "event": event.name,
        }
        if data is not None:
            message["data"] = data.model_dump(by_alias=True, exclude_none=True)
        for listener in list(self._listeners):
            listener(message)
