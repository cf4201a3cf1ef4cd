"""``--fork``: the command returns when clients can connect, and the server goes on in the background."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

_READY = b"1"


def fork_until_ready() -> Callable[[], None]:
    """Fork. Returns in the child only: a function to call when clients can connect.

    The parent exits 0 when the child calls it, and 1 when the child ends without. Until then the child keeps standard
    error, so its messages are seen. To be called before there are threads or an event loop.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) == _READY else 1)
    os.close(reader)
    os.setsid()

    def ready() -> None:
        sys.stdout.flush()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(writer, _READY)
        os.close(writer)

    return ready
