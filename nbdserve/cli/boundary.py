"""Where errors become a message and an exit code: 1 for what the user or the machine has to mend."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final

from nbdserve.errors import NbdserveError

_INTERRUPTED: Final = 128 + signal.SIGINT

_received: Final[list[int]] = []
"""The signals that ended the process, in the place of Ctrl-C."""


def heed_termination() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, so that what is half made is removed.

    From the main thread. A signal that is ignored (``nohup``) stays so, and servers have their own way to end.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    handler = signal.getsignal(signal.SIGINT)  # asyncio's, while a loop runs; none where a shell has us ignore it
    if not callable(handler):
        raise KeyboardInterrupt
    handler(number, frame)


def guarded(program: str, run: Callable[[], int]) -> int:
    """The exit code of ``run``; an error raised on purpose, or by the kernel, is printed and gives 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are any bytes
    try:
        code = run()
        sys.stdout.flush()
        return _of_signal(code)
    except BrokenPipeError:  # the reader of our output is gone (``| head``)
        _drop_output()
        return 1
    except (NbdserveError, OSError) as error:
        if _drop_output() and isinstance(error, OSError) and error.filename is None:
            error.filename = "standard output"
        complain(program, error)
        return 1
    except KeyboardInterrupt:
        return _of_signal(_INTERRUPTED)


def _of_signal(code: int) -> int:
    """The exit code, and for that of Ctrl-C the one of the signal that was in its place."""
    return 128 + _received[0] if _received and code == _INTERRUPTED else code


def _drop_output() -> bool:
    """Whether standard output does not take what is left; the flush at exit must not fail for the same reason."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def complain(program: str, error: BaseException) -> None:
    """Print the message, ``program:`` before each line of it."""
    for line in _text(error).splitlines():
        print(f"{program}: {line}", file=sys.stderr)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
