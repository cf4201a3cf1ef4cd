from pathlib import Path

import pytest

from nbdserve.cli.boundary import guarded
from nbdserve.cli.main import PROGRAM
from nbdserve.cli.main import run as run_here
from nbdserve.errors import ImageError
from tests.cli.processes import NBDSERVE, run


def test_an_error_is_a_message_and_the_exit_code_1(tmp_path: Path) -> None:
    done = run(*NBDSERVE, "image", "info", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"nbdserve: {tmp_path / 'none'}: cannot be opened: No such file or directory\n"


def test_commands_can_be_run_without_exiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["nbdserve", "image", "info", str(tmp_path / "none")])
    assert guarded(PROGRAM, run_here) == 1
    with pytest.raises(ImageError):
        run_here()


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
