"""Where errors become a message and an exit code: 1 for what the user or the machine has to mend."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from nbdserve.errors import NbdserveError


def guarded(program: str, run: Callable[[], int]) -> int:
    """The exit code of ``run``; an error raised on purpose, or by the kernel, is printed and gives 1."""
    try:
        return run()
    except BrokenPipeError:
        # The reader of our output is gone (``| head``); the flush at exit must not fail for the same reason.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (NbdserveError, OSError) as error:
        complain(program, error)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def complain(program: str, error: BaseException) -> None:
    """Print the message, ``program:`` before each line of it."""
    for line in _text(error).splitlines():
        print(f"{program}: {line}", file=sys.stderr)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
