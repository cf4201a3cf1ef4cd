"""``nbdserve serve`` as a process, with real clients."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from tests.admin.clients import RawClient
from tests.cli.processes import NBDSERVE, SECONDS, greets, needs, output, run, started, stop, until

SERVE = [*NBDSERVE, "serve"]
needs_clients = needs("qemu-img", "qemu-io", "nbdinfo")


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    """a.raw, holding the letter a, and b.raw."""
    paths = [tmp_path / "a.raw", tmp_path / "b.raw"]
    for path in paths:
        path.write_bytes(path.name[:1].encode() * 65536)
    return paths


@needs_clients
def test_prints_uris_that_work_on_every_listener(tmp_path: Path, disks: list[Path]) -> None:
    argv = ["-f", "raw", "-k", tmp_path / "s", "-p", "0", *disks]
    with started(*SERVE, *argv) as server:
        assert server.stdout is not None
        uris = [server.stdout.readline().strip() for _ in range(4)]
        assert uris[0] == f"nbd+unix:///a.raw?socket={tmp_path}/s"
        assert re.fullmatch(r"nbd://127\.0\.0\.1:\d+/b\.raw", uris[3])
        for uri in uris:
            byte = ord("a" if "a.raw" in uri else "b")
            output("qemu-io", "-f", "raw", "-c", f"read -P {byte} 0 64k", uri)
        listed = output("nbdinfo", "--list", uris[0].replace("a.raw", ""))
        assert re.findall(r'export="(.*)"', listed) == ["a.raw", "b.raw"]
        default = uris[0].replace("a.raw", "")
        output("qemu-io", "-f", "raw", "-c", "read -P 0x61 0 64k", default)
        assert stop(server) == 0
        assert server.stdout.read() == ""
    assert not (tmp_path / "s").exists()


@needs_clients
def test_names(tmp_path: Path, disks: list[Path]) -> None:
    sock = tmp_path / "s"
    a, b = disks
    for argv, names, default in (
        (["-x", "x y", a], ["x y"], "a"),
        ([f"one={a}", f"two={b}"], ["one", "two"], "a"),
        (["-x", "two", f"one={a}", f"two={b}"], ["one", "two"], "b"),
    ):
        with started(*SERVE, "-f", "raw", "-k", sock, *argv) as server:
            assert server.stdout is not None
            server.stdout.readline()
            listed = output("nbdinfo", "--list", f"nbd+unix:///?socket={sock}")
            assert re.findall(r'export="(.*)"', listed) == names
            output("qemu-io", "-f", "raw", "-c", f"read -P {ord(default)} 0 64k", f"nbd+unix:///?socket={sock}")
            assert stop(server, signal.SIGINT) == 0


@needs_clients
def test_configuration_file_and_command_line_over_it(tmp_path: Path, disks: list[Path]) -> None:
    config = tmp_path / "nbdserve.toml"
    config.write_text(
        '[server]\nlisten = ["unix:from-file"]\ndefault_export = "two"\npid_file = "pid"\n'
        '[exports.two]\npath = "b.raw"\nformat = "raw"\nread_only = true\ndescription = "the second"\n'
    )
    with started(*SERVE, "-c", config, cwd=Path("/")) as server:
        assert server.stdout is not None
        assert server.stdout.readline().strip() == f"nbd+unix:///two?socket={tmp_path}/from-file"
        told = output("nbdinfo", f"nbd+unix:///?socket={tmp_path}/from-file")
        assert "description: the second" in told
        assert "is_read_only: true" in told
        assert int((tmp_path / "pid").read_text()) == server.pid
        assert stop(server) == 0
    with started(*SERVE, "-c", config, "-k", tmp_path / "s", "-f", "raw", disks[0]) as server:
        assert server.stdout is not None
        assert server.stdout.readline().strip() == f"nbd+unix:///two?socket={tmp_path}/s"
        assert server.stdout.readline().strip() == f"nbd+unix:///a.raw?socket={tmp_path}/s"
        assert stop(server) == 0


@needs_clients
def test_exit_last_and_abstract_socket(disks: list[Path]) -> None:
    name = f"@nbdserve-test-{os.getpid()}"
    with started(*SERVE, "--exit-last", "-k", name, "-f", "raw", disks[0]) as server:
        assert server.stdout is not None
        assert server.stdout.readline().strip() == f"nbd+unix:///a.raw?socket={name}"
        qemu = f'json:{{"driver":"raw","file":{{"driver":"nbd","server.type":"unix","server.path":"{name[1:]}",'
        output("qemu-io", "-c", "read -P 0x61 0 64k", qemu + '"server.abstract":true}}')
        assert server.wait(SECONDS) == 0


@needs_clients
def test_image_root(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for directory in (outside, inside):
        directory.mkdir()
    output("qemu-img", "create", "-q", "-f", "qcow2", outside / "base.qcow2", "1M")
    top = inside / "top.qcow2"
    output("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", outside / "base.qcow2", top)
    argv = [*SERVE, "-k", tmp_path / "s", "--fork", "--exit-last", top]
    refused = run(*argv)
    assert refused.returncode == 1
    assert str(outside / "base.qcow2") in refused.stderr
    assert not (tmp_path / "s").exists()
    output(*argv, "--image-root", outside)
    assert "1048576" in output("nbdinfo", "--size", f"nbd+unix:///?socket={tmp_path}/s")
    until(lambda: not (tmp_path / "s").exists(), "it ends with its only client")


def test_admin(tmp_path: Path, disks: list[Path]) -> None:
    socket_path = tmp_path / "admin"
    with started(*SERVE, "--admin", socket_path, "--admin", "127.0.0.1:0", "-k", tmp_path / "s") as server:
        until(lambda: greets(socket_path), "it answers")
        client = RawClient(str(socket_path)).negotiate()
        assert client.execute("quit") == {}
        client.close()
        assert server.wait(60) == 0
        assert "uid=" in server.communicate()[1]
    assert not socket_path.exists()


def test_mistakes(tmp_path: Path, disks: list[Path]) -> None:
    config = tmp_path / "nbdserve.toml"
    config.write_text("[exports.x]\npth = 'x'\n")
    deaf = tmp_path / "deaf.toml"
    deaf.write_text("[server]\nlisten = []\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for argv, code, named in (
            ([], 2, "nothing to serve"),
            (["--bogus"], 2, "--bogus"),
            (["-c", deaf, disks[0]], 2, "nobody could connect"),
            (["--cache=fast", disks[0]], 2, "--cache=fast"),
            (["-o", "1x", disks[0]], 2, "--offset=1x"),
            (["-e", "-1", disks[0]], 2, "--shared=-1"),
            (["--detect-zeroes=unmap", disks[0]], 2, "discard"),
            (["-c", config, "-r"], 1, "did you mean 'path'"),
            (["-r"], 2, "--read-only describes an IMAGE"),
            (["-c", tmp_path / "absent"], 1, "absent"),
            ([tmp_path / "absent.raw"], 1, "absent.raw"),
            (["-f", "nope", disks[0]], 1, "'nope'"),
            (["--admin", "192.0.2.1:1"], 1, "::1 only"),
            (["-p", "x", disks[0]], 1, "port 'x'"),
            (["-p", str(port), disks[0]], 1, f"127.0.0.1:{port}: the port is in use"),
            (["-f", "raw", "-k", tmp_path / "s", disks[0], disks[0]], 1, "a.raw"),
            (["-f", "raw", "-k", tmp_path / "s", "-x", "no", *disks], 1, "'no'"),
        ):
            done = run(*SERVE, *argv)
            assert (done.returncode, done.stdout) == (code, ""), argv
            assert done.stderr.startswith("nbdserve: "), argv
            assert named in done.stderr, argv
            assert not (tmp_path / "s").exists()


def test_inherited_sockets_leave_nothing_to_bind(disks: list[Path]) -> None:
    program = (
        f"import os; os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv({SERVE[0]!r}, {SERVE!r}"
    )
    with socket.create_server(("127.0.0.1", 0)) as sock:
        code = f"import os; os.dup2({sock.fileno()}, 3, inheritable=True); {program} + ['-p', '1', {str(disks[0])!r}])"
        os.set_inheritable(sock.fileno(), True)
        pid = os.posix_spawn(SERVE[0], [SERVE[0], "-c", code], os.environ)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
