"""``python -m tests.perf``: nbdserve, qemu-nbd and nbdkit in turn, on the same data, with the same client.

Every case runs in rounds; in each round every server is started anew, measured and ended, in an order that rotates,
so that a drift of the machine meets all of them alike. The figure of a server is the median of its rounds. Exit code
1 when a ratio misses its floor. The server ``ceiling``, on request, shows how fast the client itself can read here.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from nbdserve.units import MIB, parse_size
from tests.perf.cases import CASES, Case, selected
from tests.perf.clients import measure
from tests.perf.format_cases import format_cases
from tests.perf.format_images import build_formats
from tests.perf.images import Images, build
from tests.perf.report import OURS, Figures, Result, print_table, save
from tests.perf.servers import CEILING, NBDKIT, QEMU_NBD, ServerKind, build_ceiling, installed_command, running


def run_case(case: Case, kinds: list[ServerKind], images: Images, rounds: int, seconds: float) -> Result:
    """All rounds of one case."""
    able = [kind for kind in kinds if images.serves(kind, case)]
    result = Result(case, {kind.name: Figures() for kind in able})
    images.warm(case)
    for number in range(rounds):
        start = number % max(len(able), 1)
        for kind in able[start:] + able[:start]:
            image = images.path(case)
            try:
                with running(images.server(kind, case), image, images.format(case)) as server:
                    figures = result.servers[kind.name]
                    figures.values.append(measure(case, server.uri, images.size, seconds))
                    figures.cpu_seconds.append(server.cpu_seconds())
                    figures.peak_rss_mib = max(figures.peak_rss_mib, server.peak_rss_mib())
            finally:
                if case.fresh:
                    image.unlink()
            if case.writes:
                images.settle(case)
    return result


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; errors end with code 2."""
    parser = argparse.ArgumentParser(prog="python -m tests.perf", description=__doc__)
    parser.add_argument("--rounds", type=int, help="rounds of each case (default 5, with --quick 1)")
    parser.add_argument("--seconds", type=float, help="length of one fio run (default 3, with --quick 1)")
    parser.add_argument("--size", type=parse_size, help="size of the disk (default 1G, with --quick 256M)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="TEXT", help="only cases whose name contains a TEXT")
    parser.add_argument("--format", nargs="+", default=[], metavar="NAME", help="cases of other formats; all: of each")
    parser.add_argument("--servers", nargs="+", default=[OURS, "qemu-nbd", "nbdkit"], metavar="NAME")
    parser.add_argument("--server-command", default=installed_command(), help="ours: {socket} {format} {image}")
    parser.add_argument("--directory", type=Path, help="keep the images here and use them again (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="save every figure")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small disk, short and few rounds")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.rounds = arguments.rounds or (1 if quick else 5)
    arguments.seconds = arguments.seconds or (1.0 if quick else 3.0)
    arguments.size = arguments.size or (256 * MIB if quick else 1024 * MIB)
    try:
        arguments.chosen = selected(arguments.cases, format_cases(arguments.format) if arguments.format else CASES)
    except ValueError as error:
        parser.error(str(error))
    known = {OURS: ServerKind(OURS, arguments.server_command), QEMU_NBD.name: QEMU_NBD, NBDKIT.name: NBDKIT}
    if unknown := [name for name in arguments.servers if name not in known and name != CEILING]:
        parser.error(f"unknown server {unknown[0]}; there are: {', '.join(known)}, {CEILING}")
    arguments.kinds = [known[name] for name in arguments.servers if name != CEILING]
    if missing := [tool for tool in ("fio", "nbdcopy", "nbdkit", "qemu-nbd", "qemu-img") if not shutil.which(tool)]:
        parser.error(f"not installed: {', '.join(missing)}")
    return arguments


def main(argv: list[str]) -> int:
    """Measure, print, save; 1 when a floor is missed."""
    arguments = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    progress = Console(stderr=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="nbd-perf-") as temporary:
        directory = arguments.directory or Path(temporary)
        progress.print(f"images in {directory}")
        if CEILING in arguments.servers:
            arguments.kinds.append(build_ceiling(Path(temporary)))
        make = build_formats if arguments.format else build
        images = make(directory, arguments.size, {case.image for case in arguments.chosen})
        for case in arguments.chosen:
            result = run_case(case, arguments.kinds, images, arguments.rounds, arguments.seconds)
            results.append(result)
            medians = ", ".join(f"{name} {figures.median:,.2f}" for name, figures in result.servers.items())
            progress.print(f"{case.name}: {medians} {case.unit}")
    settings = {"rounds": arguments.rounds, "seconds": arguments.seconds, "size": arguments.size}
    print_table(console, results, f"medians of {arguments.rounds} rounds, {arguments.size // MIB} MiB disk")
    if arguments.json:
        save(arguments.json, results, settings)
    missed = [result for result in results if False in (result.passed("qemu-nbd"), result.passed("nbdkit"))]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
