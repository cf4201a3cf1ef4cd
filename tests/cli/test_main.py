import re

from nbdserve import __version__
from tests.cli.processes import NBDSERVE, run


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_version() -> None:
    done = run(*NBDSERVE, "--version")
    assert (done.returncode, done.stdout) == (0, f"nbdserve {__version__}\n")


def test_help_lists_the_commands() -> None:
    done = run(*NBDSERVE, "--help")
    assert done.returncode == 0
    for command in ("serve", "demo", "image"):
        assert re.search(rf"\b{command}\b", plain(done.stdout))


def test_usage_errors_exit_with_2() -> None:
    for argv in (["bogus"], ["--bogus"], ["serve", "--bogus"], ["demo", "x"]):
        done = run(*NBDSERVE, *argv)
        assert done.returncode == 2
        assert done.stderr.startswith("nbdserve: ")
        assert "--help" in done.stderr


def test_a_server_imports_nothing_of_the_other_commands() -> None:
    code = (
        "import sys; sys.argv = ['nbdserve', 'serve', '--help']\n"
        "import nbdserve.cli.main as m\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "assert 'nbdserve.cli.demo' not in sys.modules and 'nbdserve.cli.image' not in sys.modules"
    )
    assert run(NBDSERVE[0], "-c", code).returncode == 0


def test_the_drop_in_imports_neither_typer_nor_pydantic() -> None:
    code = "import sys, nbdserve.cli.qemu_nbd; assert not {'typer', 'rich', 'pydantic'} & set(sys.modules)"
    assert run(NBDSERVE[0], "-c", code).returncode == 0
