import os
from typing import NoReturn

import pytest

from nbdserve.cli.boundary import guarded
from nbdserve.errors import ConfigError, ImageError


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("first\nsecond"), "p: first\np: second\n"),
        (ImageError("a.qcow2", "is odd", field="version", value=9), "p: a.qcow2: version = 9: is odd\n"),
        (FileNotFoundError(2, os.strerror(2), "name"), "p: name: No such file or directory\n"),
        (OSError(28, os.strerror(28)), "p: No space left on device\n"),
        (OSError("odd"), "p: odd\n"),
    ],
)
def test_errors_are_told(error: Exception, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> NoReturn:
        raise error

    assert guarded("p", fail) == 1
    assert capsys.readouterr() == ("", told)


def test_interrupt() -> None:
    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    assert guarded("p", interrupt) == 130


def test_success_and_mistakes_of_ours() -> None:
    assert guarded("p", lambda: 0) == 0
    with pytest.raises(ZeroDivisionError):
        guarded("p", lambda: 1 // 0)
