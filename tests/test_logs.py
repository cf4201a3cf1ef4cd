"""Messages that are written by a thread; the server's own are in ``test_a_pipe_that_nobody_reads``."""

import contextlib
import fcntl
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.cli.nbd_client import Client
from nbdserve.logs import MOST_WAITING, written_apart
from nbdserve.server.addresses import UnixAddress
from tests.admin.clients import RawClient
from tests.cli.processes import NBDSERVE, SECONDS, greets, until

log = logging.getLogger("nbdserve.x")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def unread(writer: int, monkeypatch: pytest.MonkeyPatch, most: int = MOST_WAITING) -> Iterator[None]:
    """``written_apart`` in a process that has not set up logging; pytest has."""
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        with written_apart(writer, most):
            yield
        assert logging.getLogger().handlers == []


def test_messages_are_written(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pipe
    with unread(writer, monkeypatch):
        log.warning("of %s", "a disk")
        try:
            raise OSError("cause")
        except OSError:
            log.exception("a fault")
    written = ""
    while "OSError: cause\n" not in written:
        written += os.read(reader, 1 << 16).decode()
    assert " nbdserve.x: of a disk\n" in written
    assert "Traceback" in written


def test_who_has_set_up_logging_keeps_it(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    root, own = logging.getLogger(), logging.NullHandler()
    monkeypatch.setattr(root, "handlers", [own])
    with written_apart(pipe[1]):
        assert root.handlers == [own]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_full_pipe_holds_nobody_up(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, blocking: bool) -> None:
    reader, writer = pipe
    text = "x" * fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # so the thread cannot finish the first message
    os.set_blocking(writer, blocking)
    written = b""
    with unread(writer, monkeypatch, most=2):
        for _ in range(20):
            log.warning(text)
        while b" messages lost" not in written:
            written += os.read(reader, 1 << 16)
        log.warning("again")
        while b"again\n" not in written:
            written += os.read(reader, 1 << 16)
    lost = [int(part.split()[-1]) for part in written.decode().split(" messages lost")[:-1]]
    assert written.count(text.encode()) + sum(lost) == 20
    assert sum(lost) >= 17


def test_the_end_waits_a_moment_only(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    ended = threading.Event()

    def work() -> None:
        with unread(writer, monkeypatch):
            log.warning("to nobody")
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    assert ended.wait(SECONDS)
    os.read(reader, 1 << 20)


def test_a_reader_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with unread(writer, monkeypatch):
        log.warning("to nobody")
    os.close(writer)


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """A server whose standard error is one goes on serving, and ends when it is told to."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"x" * 4096)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    sock, admin = tmp_path / "s", tmp_path / "a"
    argv = [*NBDSERVE, "serve", "-f", "raw", "--socket", str(sock), "--admin", str(admin), str(image)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=writer) as process:
        try:
            os.close(writer)
            until(lambda: greets(admin) and greets(sock), "the server answers")
            asking = RawClient(str(admin)).negotiate()
            for _ in range(5):
                assert asking.execute("query-name") == {}  # each is logged
            client = Client(UnixAddress(str(sock)))
            assert client.read(0, 4096) == b"x" * 4096
            client.close()
            asking.close()
            process.terminate()
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
            os.close(reader)
