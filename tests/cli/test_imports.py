from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from nbdserve.cli.imports import import_for_good


def test_the_collector_runs_again_afterwards() -> None:
    assert import_for_good("json").__name__ == "json"
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError):
        import_for_good("nbdserve.nothing")
    assert gc.isenabled()


def test_what_a_short_command_does_without() -> None:
    """Each of these takes 10 ms or more."""
    heavy = ("pydantic", "rich.console", "uvloop", "cryptography", "nbdserve.storage.nbd")
    code = "import sys, nbdserve.cli.image.convert; from nbdserve.formats.registry import DRIVERS; DRIVERS['qcow2']\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
