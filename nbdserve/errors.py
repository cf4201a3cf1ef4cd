"""Every error nbdserve raises on purpose, split by who can act on it.

::

    NbdserveError
    |-- ProtocolError        the peer broke the protocol          -> drop the connection
    |-- OptionError          one handshake option is refused      -> reply NBD_REP_ERR_*, go on
    |-- RequestError         one request fails                    -> reply its errno, go on
    |-- ImageError           a file is not what it should be      -> refuse the image, exit code 1
    |   |-- CorruptImageError    its metadata contradicts itself
    |   `-- UnsupportedImageError  it is valid, but asks for what is not supported here
    |-- JobError             a job cannot do what is asked of it -> reply with the message, the job goes on
    |-- ConfigError          an option, path or name is wrong     -> the user mends it, exit code 1 (usage: 2)
    `-- (OSError)            what the kernel refused; its errno travels to the client

Each boundary translates once: the connection turns RequestError and OSError into NBD error codes, the
command line turns ImageError and ConfigError into a message and an exit code.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class NbdserveError(Exception):
    """Base of the errors raised on purpose."""


class ProtocolError(NbdserveError):
    """The peer sent what the NBD protocol forbids and cannot be followed any further."""


class OptionError(NbdserveError):
    """A handshake option is answered with an error reply; negotiation goes on.

    ``reply`` is an ``NBD_REP_ERR_*`` number; the message is sent to the client.
    """

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class RequestError(NbdserveError):
    """One request fails with ``errno`` (a Linux number); the connection lives on."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message or os.strerror(errno))
        self.errno = errno


class ImageError(NbdserveError):
    """An image cannot be opened, or not in the way asked for.

    The message names the file, then the field and its value where one is at fault, then what to do.
    """

    def __init__(
        self, path: str, problem: str, *, field: str | None = None, value: object = None, hint: str = ""
    ) -> None:
        self.path, self.problem, self.field, self.value, self.hint = path, problem, field, value, hint
        shown = f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) and value > 9 else repr(value)
        where = f"{field} = {shown}: " if field is not None else ""
        super().__init__(f"{path}: {where}{problem}" + (f" ({hint})" if hint else ""))


class CorruptImageError(ImageError):
    """The image's own metadata is inconsistent; ``image check`` may be able to repair it."""


class UnsupportedImageError(ImageError):
    """The image is valid but uses a feature that is not available here."""


class ConfigError(NbdserveError):
    """Something the user wrote - an option, a path, a name - cannot be done as written."""


class JobError(NbdserveError):
    """A job does not exist, or cannot do what is asked of it now."""


def errno_of(error: BaseException) -> int:
    """The Linux errno a failed request reports for ``error``; EIO for what carries none."""
    if isinstance(error, RequestError):
        return error.errno
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, MemoryError):
        return _errno.ENOMEM
    return _errno.EIO


@contextmanager
def naming(path: str) -> Iterator[None]:
    """The kernel's errors on a descriptor name no file: those that pass here get ``path``."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:
            error.filename = path
        raise
