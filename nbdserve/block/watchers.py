"""Who is told of a node's changes: dirty bitmaps and mirrors after each, copy-before-write before it.

A node without watchers does nothing for them, not even a test: ``Node.watch`` exchanges the forms of its requests.
"""

from __future__ import annotations

from typing import ClassVar


class Watcher:
    """Told of the changes of one node; override what is wanted.

    It stays with the node when the layers change (``Node.reshape``): what it is told of are guest ranges.
    """

    goes_before: ClassVar[bool] = False
    """``before`` is wanted. Every write then is a task of its own, which is what it costs."""

    def changed(self, offset: int, length: int) -> None:
        """The guest bytes of the range have changed, or some of them (the request failed or was cancelled).

        Called on the event loop after the change and before it is acknowledged; must neither wait nor raise. Who
        clears a mark and then reads the range therefore sees the change, or finds the mark again.
        """

    async def before(self, offset: int, length: int) -> None:
        """The guest bytes of the range are about to change; reading the node gives the old ones.

        The change waits for the return. What is raised here (OSError, RequestError) fails the request instead.
        """

    def resized(self, old_size: int, size: int) -> None:
        """The disk has another size, in bytes; no request is in flight."""
