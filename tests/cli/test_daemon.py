import sys
import time

import pytest

from tests.cli.processes import run

_CODE = """
import os, sys, time
from nbdserve.cli.daemon import fork_until_ready
ready = fork_until_ready()
print("early", file=sys.stderr, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "code"),
    [("ready(); time.sleep(3)", 0), ("raise SystemExit(0)", 1), ("os.abort()", 1)],
)
def test_the_command_ends_when_the_server_is_ready_or_gone(then: str, code: int) -> None:
    begun = time.monotonic()
    done = run(sys.executable, "-c", _CODE.format(then=then))
    assert (done.returncode, done.stderr) == (code, "early\n")
    # Nothing of the child holds the pipes of its standard streams open.
    assert time.monotonic() - begun < 2.5
