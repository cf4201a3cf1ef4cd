"""Write thresholds: clients are told once when a disk, or the file under it, has grown past one."""

from __future__ import annotations

from weakref import WeakSet

from nbdserve.admin.events import BLOCK_WRITE_THRESHOLD, Events, WriteThreshold
from nbdserve.block.node import Node
from nbdserve.block.watchers import Watcher
from nbdserve.storage.base import Storage


class _Threshold(Watcher):
    """Of the guest offsets that are written of ``node``, or, with ``file``, of the size that has."""

    def __init__(self, thresholds: Thresholds, name: str, node: Node, file: Storage | None, value: int) -> None:
        self.value = value
        self._thresholds = thresholds
        self._name = name
        self.node = node
        self.part: Node | Storage = file or node
        self._file = file

    def changed(self, offset: int, length: int) -> None:
        end = offset + length if self._file is None else self._file.size
        if end > self.value:
            self._thresholds.passed(self, self._name, end - self.value)


class Thresholds:
    """Those that are set: each is its node's, which it ends with."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._set: WeakSet[_Threshold] = WeakSet()

    def set(self, name: str, node: Node, file: Storage | None, value: int) -> None:
        """Tell when ``value``, in bytes, is passed; 0: do not. ``name`` is that of ``node``, or of its ``file``."""
        old = self._find(file or node)
        if old is not None:
            self._drop(old)
        if value:
            threshold = _Threshold(self, name, node, file, value)
            self._set.add(threshold)
            node.watch(threshold)

    def get(self, part: object) -> int:
        """The threshold of a node or file; 0: none."""
        found = self._find(part)
        return 0 if found is None else found.value

    def _find(self, part: object) -> _Threshold | None:
        return next((threshold for threshold in self._set if threshold.part is part), None)

    def _drop(self, threshold: _Threshold) -> None:
        self._set.discard(threshold)
        threshold.node.unwatch(threshold)

    def passed(self, threshold: _Threshold, name: str, exceeded: int) -> None:
        """Tell everyone, once."""
        if threshold in self._set:
            self._drop(threshold)
            data = WriteThreshold(node_name=name, amount_exceeded=exceeded, write_threshold=threshold.value)
            self._events.emit(BLOCK_WRITE_THRESHOLD, data)
