from __future__ import annotations

import subprocess
import sys

import pytest

from nbdserve.cli.image.commands import _PLACES
from tests.cli.image.helpers import image


@pytest.mark.parametrize("command", _PLACES)
def test_every_command_is_there(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    ran = image(monkeypatch, command, "--help")
    assert ran.code == 0
    assert "Usage" in ran.out


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = image(monkeypatch, "invent")
    assert (ran.code, "No such command 'invent'" in ran.err) == (2, True)


def test_a_command_imports_no_more_than_it_needs() -> None:
    code = (
        "import sys; from nbdserve.cli.image.commands import app; import nbdserve.cli.image.convert\n"
        "print([name for name in sys.modules if name.startswith('nbdserve.formats.v') or name == 'rich.progress'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
