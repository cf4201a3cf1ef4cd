"""``ARCHITECTURE.md`` names what is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.house.repository import PACKAGE, ROOT, python_files

DOCUMENT = PACKAGE / "ARCHITECTURE.md"
NAME = re.compile(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)*|[A-Za-z_0-9/]+\.py(?:::\w+)?|[a-z_0-9/]+/)`")


def names() -> list[str]:
    """The names in backticks that look like code or files."""
    return NAME.findall(DOCUMENT.read_text())


def test_the_files_it_names_exist() -> None:
    files = {path.name for path in python_files(PACKAGE)}
    missing = []
    for name in names():
        path, _, test = name.partition("::")
        if name.endswith("/"):
            found = (PACKAGE / path).is_dir()
        elif path.startswith("tests/"):
            found = (ROOT / path).exists() and (not test or f"def {test}(" in (ROOT / path).read_text())
        elif path.endswith(".py"):
            found = (PACKAGE / path).exists() or Path(path).name in files
        else:
            continue
        if not found:
            missing.append(name)
    assert missing == []


def test_the_methods_it_names_exist() -> None:
    source = "\n".join(path.read_text() for path in python_files(PACKAGE))
    methods = [name for name in names() if "." in name and name[0].isupper() and not name.endswith((".md", ".py"))]
    assert len(methods) > 20
    missing = []
    for name in methods:
        owner, _, method = name.partition(".")
        if f"class {owner}" not in source or not re.search(rf"\bdef {method}\(|\bself\.{method}\b", source):
            missing.append(name)
    assert missing == []


def test_the_functions_it_names_exist() -> None:
    source = "\n".join(path.read_text() for path in python_files(PACKAGE))
    functions = [name for name in names() if name.startswith("_")]
    assert [name for name in functions if f"def {name}(" not in source] == []
