"""What can be done with each format, as its driver says: the table in the README.

``python -m nbdserve.formats.capabilities`` prints it.
"""

from __future__ import annotations

from typing import Final

from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import DRIVERS

COLUMNS: Final = ("format", "read", "write", "create", "check", "repair", "backing", "rebase", "resize")


def capabilities(driver: type[FormatDriver]) -> tuple[str, ...]:
    """The row of a driver, in the order of COLUMNS; an empty word where it cannot."""
    backing = driver.backing_formats
    return (
        driver.name,
        "yes",
        _word(driver.can("lookup_writable")),
        _word(driver.can("create")),
        _word(driver.can("check")),
        _word(driver.can("check") and driver.repairs),
        "any format" if backing is None else ", ".join(backing),
        _word(driver.can("set_backing")),
        _word(driver.can("resize")),
    )


def table() -> str:
    """All rows, as Markdown, the format written to most first: raw, qcow2, then by name."""
    drivers = sorted(DRIVERS.values(), key=lambda driver: (driver.name != "raw", driver.name != "qcow2", driver.name))
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(capabilities, drivers)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _word(can: bool) -> str:
    return "yes" if can else ""


if __name__ == "__main__":
    print(table(), end="")
