"""The layers of the package, as ``lint-imports`` holds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.repository import PACKAGE, ROOT


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "lint-imports"
    return subprocess.run([program, "--no-cache"], cwd=root, capture_output=True, text=True, check=False)


def test_the_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nbdserve/units.py", "import nbdserve.errors"),
        ("nbdserve/storage/base.py", "import nbdserve.formats.base"),
        ("nbdserve/protocol/constants.py", "import nbdserve.storage.base"),
        ("nbdserve/protocol/constants.py", "import asyncio"),
        ("nbdserve/stray.py", ""),
    ],
)
def test_an_import_against_the_layers_is_found(tmp_path: Path, module: str, line: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "nbdserve", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert module.removesuffix(".py").replace("/", ".") in said
