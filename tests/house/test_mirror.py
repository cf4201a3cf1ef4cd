"""``tests/`` mirrors ``nbdserve/``: the tests of ``nbdserve/x/y.py`` are in ``tests/x/test_y.py``."""

from __future__ import annotations

from tests.house.repository import PACKAGE, TESTS, python_files, shown

DECLARATIONS = {
    "admin/blockdev.py",
    "block/spec.py",
    "formats/luks/options.py",
    "protocol/constants.py",
    "storage/base.py",
}
"""Modules that only declare - abstract methods, fields, numbers - and so have nothing to run."""


def test_every_module_has_its_tests() -> None:
    lacking = []
    for module in python_files(PACKAGE):
        place = module.relative_to(PACKAGE)
        if module.name == "__init__.py" or str(place) in DECLARATIONS:
            continue
        if not (TESTS / place.parent / f"test_{module.name}").exists():
            lacking.append(f"{shown(module)}: no tests/{place.parent / f'test_{module.name}'}")
    assert not lacking, "\n".join(lacking)


def test_the_list_of_declarations_is_current() -> None:
    assert [name for name in DECLARATIONS if not (PACKAGE / name).exists()] == []
    assert [name for name in DECLARATIONS if (TESTS / name).with_name(f"test_{name.rpartition('/')[2]}").exists()] == []


def test_packages_have_no_code_in_init() -> None:
    """``__init__.py`` says what the package is; the root's also has the version."""
    for init in PACKAGE.rglob("__init__.py"):
        code = [line for line in init.read_text().splitlines() if line.startswith(("def ", "class ", "async "))]
        assert code == [], shown(init)
