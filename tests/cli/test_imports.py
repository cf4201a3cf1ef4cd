from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.cli.imports import import_for_good


def test_the_collector_runs_again_afterwards() -> None:
    assert import_for_good("json").__name__ == "json"
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError):
        import_for_good("nbdserve.nothing")
    assert gc.isenabled()


_PRINTS_MODULES = """
import sys
from nbdserve.cli.main import main
try:
    main()
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
_ENGINE = {"asyncio", "numpy", "construct", "nbdserve.block.graph"}
_RARE = {
    "pydantic",
    "rich.console",
    "uvloop",
    "cryptography",
    "nbdserve.storage.nbd",
    "nbdserve.formats.encryption.xts",
    "nbdserve.formats.luks.layout",
    "nbdserve.formats.vmdk.driver",
}
"""Each of these takes 5 ms or more, and is needed for few images or none."""


@pytest.mark.parametrize(
    ("arguments", "most", "without"),
    [
        pytest.param(["--version"], 12, _RARE | _ENGINE, id="version"),
        pytest.param(["--help"], 12, _RARE - {"rich.console"} | _ENGINE, id="help"),
        pytest.param(["image", "--help"], 14, _RARE - {"rich.console"} | _ENGINE, id="image help"),
        pytest.param(["admin", "-s", "none", "stop", "--output", "json"], 20, _RARE | _ENGINE, id="admin"),
        pytest.param(["image", "map", "--output", "json", "image"], 110, _RARE, id="map"),
        pytest.param(["image", "info", "image"], 110, _RARE, id="info"),
        pytest.param(["image", "create", "-q", "-f", "qcow2", "new", "1M"], 110, _RARE, id="create"),
        pytest.param(["image", "convert", "-O", "qcow2", "image", "copy"], 130, _RARE, id="convert"),
        pytest.param(["serve", "-f", "qcow2", "missing"], 130, _RARE - {"pydantic", "uvloop"}, id="serve"),
    ],
)
def test_a_command_imports_no_more_than_it_needs(
    tmp_path: Path, arguments: list[str], most: int, without: set[str]
) -> None:
    """Imports are most of the time that a short command takes: ``most`` counts the modules of this project."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "image", "1M"], cwd=tmp_path, check=True)
    command = [sys.executable, "-c", _PRINTS_MODULES, *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    modules = set(ran.stderr.splitlines()[-1].split())
    assert "nbdserve.cli.main" in modules
    assert not modules & without
    own = sorted(name for name in modules if name.split(".")[0] == "nbdserve")
    assert len(own) <= most, own


@pytest.mark.parametrize("module", ["main", "qemu_nbd"])
def test_algebra_gets_no_threads(module: str) -> None:
    """A process that has threads already must not fork."""
    code = f"import os, nbdserve.cli.{module}, numpy; print(len(os.listdir('/proc/self/task')))"
    command = ["env", "-u", "OPENBLAS_NUM_THREADS", sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"
