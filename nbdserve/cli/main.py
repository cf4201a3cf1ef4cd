"""``nbdserve``: the entry point."""

from __future__ import annotations

import sys
from typing import Final

from nbdserve.cli.boundary import guarded, heed_termination
from nbdserve.cli.imports import import_for_good

PROGRAM: Final = "nbdserve"


def main() -> None:
    """Exit code 0, 1 for an error, 2 for a command line that cannot be understood, 128 and the number of a signal."""
    heed_termination()
    sys.exit(guarded(PROGRAM, run))


def run() -> int:
    """What ``main`` does, without exiting. Errors are raised."""
    return int(import_for_good("nbdserve.cli.commands").run(PROGRAM))


if __name__ == "__main__":
    main()
