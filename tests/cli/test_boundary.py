import os
import signal
import subprocess
import sys
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


@pytest.mark.parametrize("ignored", ["SIGINT", "SIGHUP"])
def test_signals_that_end_a_process(ignored: str) -> None:
    """One that is ignored stays so; the others are as Ctrl-C, also where a shell has Ctrl-C ignored."""
    code = (
        "import os, signal, sys, time; from nbdserve.cli.boundary import guarded, heed_termination\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"signal.signal(signal.{ignored}, signal.SIG_IGN)\n"
        "heed_termination()\n"
        "def run():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{ignored})\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('removed')\n"
        "sys.exit(guarded('p', run))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (128 + signal.SIGTERM, "removed\n", "")


def test_success_and_mistakes_of_ours() -> None:
    assert guarded("p", lambda: 0) == 0
    with pytest.raises(ZeroDivisionError):
        guarded("p", lambda: 1 // 0)


def test_output_that_is_not_taken() -> None:
    """Nothing is left for the flush at exit, which would fail in Python's own words."""
    code = "import sys; from nbdserve.cli.boundary import guarded; sys.exit(guarded('p', lambda: print('told') or 0))"
    command = ["env", "-u", "PYTHONUNBUFFERED", sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "p: standard output: No space left on device\n")


def test_names_of_files_are_any_bytes() -> None:
    code = "import os, sys; from nbdserve.cli.boundary import guarded; "
    code += "sys.exit(guarded('p', lambda: print(os.fsdecode(b'n\\xff')) or 0))"
    command = ["env", "PYTHONIOENCODING=utf-8:strict", sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"n\xff\n", b"")
