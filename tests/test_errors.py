"""The errors: what they say, and the errno a request reports for them."""

from __future__ import annotations

import errno

import pytest

from nbdserve.errors import (
    CorruptImageError,
    ImageError,
    NbdserveError,
    OptionError,
    ProtocolError,
    RequestError,
    UnsupportedImageError,
    errno_of,
)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (RequestError(errno.EPERM, "not allowed"), errno.EPERM),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("without a number"), errno.EIO),
        (TimeoutError(), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (KeyError("bug"), errno.EIO),
        (ProtocolError("peer"), errno.EIO),
    ],
)
def test_a_failed_request_reports_the_errno_of_its_error(error: Exception, number: int) -> None:
    assert errno_of(error) == number


def test_an_image_error_names_file_field_value_problem_and_hint() -> None:
    error = ImageError("/a.qcow2", "is too large", field="cluster_bits", value=22, hint="use at most 21")
    assert str(error) == "/a.qcow2: cluster_bits = 0x16: is too large (use at most 21)"
    assert str(ImageError("/a", "bad", field="x", value=9)) == "/a: x = 9: bad"
    assert str(ImageError("/a", "bad", field="x", value="n")) == "/a: x = 'n': bad"
    assert str(ImageError("/a", "is a directory")) == "/a: is a directory"


def test_a_request_error_without_a_message_says_what_its_errno_means() -> None:
    assert str(RequestError(errno.ENOSPC)) == "No space left on device"


def test_every_deliberate_error_is_an_nbdserve_error() -> None:
    for error in (ProtocolError, OptionError, RequestError, ImageError):
        assert issubclass(error, NbdserveError)
    assert issubclass(CorruptImageError, ImageError)
    assert issubclass(UnsupportedImageError, ImageError)
    assert OptionError(1 << 31 | 2, "policy").reply == 1 << 31 | 2
