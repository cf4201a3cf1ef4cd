import os
import signal
import sys
from pathlib import Path

import pytest

from tests.cli.processes import is_running, run

_CODE = """
import os, sys, time
from nbdserve.cli.daemon import fork_until_ready
ready = fork_until_ready()
print("early", file=sys.stderr, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("open(sys.argv[1], 'w').write(str(os.getpid())); ready(); time.sleep(3600)", 0),
        ("raise SystemExit(0)", 1),
        ("os.abort()", 1),
    ],
)
def test_the_command_ends_when_the_server_is_ready_or_gone(tmp_path: Path, then: str, code: int) -> None:
    pid_file = tmp_path / "pid"
    # It returns, so nothing of the child holds the pipes of its standard streams open.
    done = run(sys.executable, "-c", _CODE.format(then=then), pid_file)
    assert (done.returncode, done.stderr) == (code, "early\n")
    assert pid_file.exists() == (code == 0)
    if code == 0:
        pid = int(pid_file.read_text())
        assert is_running(pid)
        os.kill(pid, signal.SIGKILL)
