import errno

from nbdserve.admin.errors import QmpError, description_of
from nbdserve.errors import ConfigError, NbdserveError


def test_descriptions() -> None:
    assert description_of(ConfigError("x: bad")) == "x: bad"
    assert description_of(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert description_of(FileNotFoundError(2, "No such file or directory", "/a")) == "/a: No such file or directory"
    assert description_of(MemoryError()) == "MemoryError"


def test_a_failed_command_is_an_error_raised_on_purpose() -> None:
    assert isinstance(QmpError("x"), NbdserveError)
    assert QmpError("x").kind == "GenericError"
