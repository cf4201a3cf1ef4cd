"""Requests with bytes changed at random: each is answered here as by qemu-storage-daemon, and the server goes on.

``python -m tests.admin.fuzz [ROUNDS [SEED]]`` runs more of it than the tests do.
"""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.admin.broken_input import INPUTS, REQUESTS
from tests.admin.clients import RawClient, storage_daemon
from tests.cli.processes import NBDSERVE, greets, until

COMMANDS: Final = (
    b'{"execute":"query-version","id":7}',
    b'{"execute":"block-dirty-bitmap-add","arguments":{"node":"none","name":"b","granularity":65536},"id":"a"}',
    b'{"execute":"blockdev-del","arguments":{"node-name":"none"}}',
    b'{"execute":"job-cancel","arguments":{"id":"none"},"id":[1,2,{"x":null}]}',
    b'{"execute":"block_resize","arguments":{"node-name":"none","size":-1.5e3}}',
    b'{"execute":"transaction","arguments":{"actions":[{"type":"abort","data":{}}]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}',
    b"{'execute':'object-del','arguments':{'id':'none'},'id':'\\u00e4'}",
)
SEEDS: Final = (*COMMANDS, *(data for data in (*INPUTS, *REQUESTS) if len(data) < 200))
_BYTES: Final = b"{}[]:,\"'\\ \t\n\r0123456789-+.eEutrfalsn\x00\x01\x1f\x7f\x80\xc3\xa4\xfe\xff"
_ANY_OF_SEVERAL: Final = re.compile(r"(Parameter|QMP input member) '.*' (?:is unexpected|must be .*)", re.DOTALL)
_RESET: Final = b"\xff"
"""Ends whatever is under way: no value has it in it (QEMU's qmp-spec.txt)."""


def changed(random_: random.Random) -> bytes:
    """A request or two with a few changes."""
    data = bytearray(b"".join(random_.choices(SEEDS, k=random_.choice((1, 1, 1, 2)))))
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data) + 1)
        end = min(len(data), at + random_.choice((1, 1, 2, 5, 20)))
        match random_.randrange(5):
            case 0:
                data[at:end] = random_.choices(_BYTES, k=end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = random_.choices(_BYTES, k=random_.choice((1, 1, 2, 5)))
            case 3:
                data[at:at] = data[at:end]
            case _:
                del data[at:]
    return bytes(data)


def answered(client: RawClient, data: bytes) -> list[Any]:
    """What ``data`` is answered, up to the answer of a request sent behind it."""
    client.send(data + _RESET + b'{"execute":"no-such-command","id":"end"}')
    got: list[Any] = []
    while (message := client.receive()).get("id") != "end":
        if "event" not in message:
            got.append(_essence(message))
    return got


def _essence(message: dict[str, Any]) -> Any:
    """Of a result only that there is one; of several members that are wrong QEMU names any, as they are hashed."""
    error = message.get("error")
    if error is None:
        return message.get("id"), None
    return message.get("id"), error["class"], _ANY_OF_SEVERAL.sub(r"\1 ...", error["desc"])


class Peers:
    """The server and QEMU's daemon, each with a client."""

    def __init__(self, ours: str, theirs: str) -> None:
        self._theirs_path = theirs
        self._ours, self._theirs = RawClient(ours).negotiate(), RawClient(theirs).negotiate()
        self._theirs.sock.settimeout(1)

    def answers(self, data: bytes) -> tuple[list[Any], list[Any]]:
        """Both answers. QEMU's monitor stalls now and then after many errors: then it is asked anew."""
        here = answered(self._ours, data)
        try:
            return here, answered(self._theirs, data)
        except TimeoutError:
            self._theirs.close()
            self._theirs = RawClient(self._theirs_path).negotiate()
            return here, answered(self._theirs, data)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


def campaign(ours: str, theirs: str, rounds: int, seed: int) -> Iterator[str]:
    """Requests that are answered in different ways, told."""
    random_ = random.Random(seed)
    peers = Peers(ours, theirs)
    for _ in range(rounds):
        data = changed(random_)
        here, there = peers.answers(data)
        if here != there:
            yield f"{data!r}\n  here {here}\n  QEMU {there}"
    peers.close()


def main(argv: Sequence[str]) -> int:
    """Run a campaign; 1 when an answer differed."""
    rounds, seed = int(argv[0]) if argv else 20_000, int(argv[1]) if argv[1:] else 1
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        (directory / "d.raw").write_bytes(bytes(4096))
        ours = directory / "admin"
        serve = ["serve", "--admin", ours, "-k", directory / "nbd", "-f", "raw", directory / "d.raw"]
        log = stack.enter_context((directory / "log").open("w+"))
        server = subprocess.Popen([*map(str, (*NBDSERVE, *serve))], stdout=subprocess.DEVNULL, stderr=log)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        until(lambda: greets(ours), "it answers")
        theirs = stack.enter_context(storage_daemon(directory))
        found = 0
        for difference in campaign(str(ours), theirs, rounds, seed):
            found += 1
            print(difference)
        found += (directory / "log").read_text().count("Traceback")
    print(f"{rounds} requests from seed {seed}: {found} wrong")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
