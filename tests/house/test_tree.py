"""What lies where in the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.house.repository import PACKAGE, ROOT, TESTS, shown

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "nbdserve", "tests", "docker", "config"}
GENERATED = {"build", "dist"}
MACHINE_PATH = re.compile(r"(?<![\w.}/])/(?:home|root|work|Users|media|mnt)/\w")
"""An absolute path that exists on one machine only."""


def test_the_top_level_holds_only_what_the_design_names() -> None:
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert entries - GENERATED <= TOP_LEVEL
    assert entries >= TOP_LEVEL


def test_no_path_of_a_machine_is_written_down() -> None:
    found = []
    for path in _texts():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line) and path != Path(__file__).resolve():
                found.append(f"{shown(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(found[:20])


def test_a_path_of_a_machine_would_be_found() -> None:
    assert MACHINE_PATH.search('IMAGE = "/home/someone/disk.raw"')
    assert MACHINE_PATH.search("cd /root/project")
    assert not MACHINE_PATH.search("https://example.org/work/paper")


def test_the_scripts_can_be_run() -> None:
    for name in ("tests/run", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111 == 0o111, name


def _texts() -> Iterator[Path]:
    yield from (ROOT / "pyproject.toml", ROOT / "README.md", ROOT / ".ci" / "run", TESTS / "run")
    for directory in (PACKAGE, TESTS, ROOT / "docker", ROOT / "config"):
        for path in sorted(directory.rglob("*")):
            generated = any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(ROOT).parts)
            if path.is_file() and not generated:
                yield path
