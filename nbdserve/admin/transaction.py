"""Actions that all happen, or none does, at one moment for the clients of all disks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from nbdserve.admin.errors import QmpError
from nbdserve.block.drain import drained
from nbdserve.block.node import Node


class Action(ABC):
    """One of them. All are prepared in their order, and then committed; or, in the reverse order, aborted."""

    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """The disks whose requests are held back meanwhile. QmpError when what the action names is not there."""

    @abstractmethod
    async def prepare(self) -> None:
        """Do it, so that ``abort`` can undo it. Whatever may fail, fails here, and has then done nothing."""

    def commit(self) -> None:
        """It counts."""

    async def abort(self) -> None:
        """Undo ``prepare``."""


class Abort(Action):
    """Fails, for tests."""

    def nodes(self) -> Sequence[Node]:
        """None."""
        return ()

    async def prepare(self) -> None:
        """QmpError."""
        raise QmpError("Transaction aborted using Abort action")


async def execute(actions: Sequence[Action]) -> None:
    """Do all of them with the requests of their disks held back; whatever one raises, nothing is done."""
    nodes = {node: None for action in actions for node in action.nodes()}
    async with drained(*nodes):
        prepared: list[Action] = []
        try:
            for action in actions:
                await action.prepare()
                prepared.append(action)
        except BaseException:
            for action in reversed(prepared):
                await action.abort()
            raise
        for action in actions:
            action.commit()
