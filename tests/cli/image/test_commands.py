from __future__ import annotations

import pytest

from nbdserve.cli.image.commands import ImageCommands
from tests.cli.image.helpers import image


@pytest.mark.parametrize("command", ImageCommands.places)
def test_every_command_is_there(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    ran = image(monkeypatch, command, "--help")
    assert ran.code == 0
    assert "Usage" in ran.out


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = image(monkeypatch, "invent")
    assert (ran.code, "No such command 'invent'" in ran.err) == (2, True)
