from __future__ import annotations

import re

from nbdserve import __version__
from nbdserve.cli.commands import Commands
from tests.cli.processes import NBDSERVE, run


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_version() -> None:
    done = run(*NBDSERVE, "--version")
    assert (done.returncode, done.stdout) == (0, f"nbdserve {__version__}\n")


def test_help_lists_the_commands() -> None:
    done = run(*NBDSERVE, "--help")
    assert done.returncode == 0
    for command in Commands.places:
        assert re.search(rf"^\W*{command}\b", plain(done.stdout), re.MULTILINE)


def test_usage_errors_exit_with_2() -> None:
    for argv in (["bogus"], ["--bogus"], ["serve", "--bogus"], ["demo", "x"]):
        done = run(*NBDSERVE, *argv)
        assert done.returncode == 2
        assert done.stderr.startswith("nbdserve: ")
        assert "--help" in done.stderr
