"""The drop-in's command line, and its life cycle as a process with real clients."""

import os
import signal
import socket
from pathlib import Path

import pytest

from nbdserve.app import ExportPlan
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.qemu_nbd import HELP, parse_arguments, plan_of, run_command_line
from nbdserve.errors import ConfigError
from nbdserve.server.addresses import TcpAddress, UnixAddress
from nbdserve.server.listeners import bind
from tests.cli.processes import QEMU_NBD, SECONDS, greets, is_running, needs, output, run, started, stop, until

needs_clients = needs("qemu-img", "qemu-io", "nbdinfo")


def image_of(*argv: str) -> ImageSpec:
    (export,) = plan_of(parse_arguments(list(argv)), []).exports
    return export.image


# --- the command line --------------------------------------------------------------------------------------------


def test_defaults() -> None:
    plan = plan_of(parse_arguments(["a.raw"]), [])
    assert plan.exports == [ExportPlan("", ImageSpec("a.raw"), max_connections=1)]
    assert plan.addresses == [TcpAddress("0.0.0.0", 10809)]
    assert plan.limits.max_clients == 1
    assert plan.exit_last
    assert plan.default_export is None


def test_short_options_combine_and_stand_anywhere() -> None:
    plan = plan_of(parse_arguments(["-rAte", "5", "a", "-fqcow2", "-xname", "-k", "/s", "-Dtext"]), [])
    (export,) = plan.exports
    assert export == ExportPlan("name", ImageSpec("a", "qcow2", read_only=True), "text", True, 5)
    assert not plan.exit_last
    assert plan.addresses == [UnixAddress("/s")]


def test_long_options() -> None:
    image = image_of(
        "--format=raw", "--read-only", "--offset=1M", "--cache=none", "--discard=on", "--detect-zeroes=unmap",
        "--aio=native", "--snapshot", "--load-snap=s1", "a",
    )  # fmt: skip
    assert image == ImageSpec(
        "a", "raw", read_only=True, offset=1 << 20, cache="none", discard="unmap", detect_zeroes="unmap", overlay=True,
        snapshot="s1",
    )  # fmt: skip
    plan = plan_of(parse_arguments(["--bind=::1", "--port=5", "--shared=0", "--persistent", "--pid-file=p", "a"]), [])
    assert plan.addresses == [TcpAddress("::1", 5)]
    assert (plan.limits.max_clients, plan.pid_file) == (0, "p")


def test_bitmaps_have_the_order_in_which_qemu_nbd_numbers_them() -> None:
    (export,) = plan_of(parse_arguments(["-r", "-B", "a", "--bitmap=b", "-Bc", "image"]), []).exports
    assert export.bitmaps == ("c", "b", "a")


def test_last_one_counts() -> None:
    assert image_of("-f", "raw", "-f", "qcow2", "a").format == "qcow2"


@pytest.mark.parametrize(("text", "snapshot"), [("s", "s"), ("snapshot.id=1", "1"), ("snapshot.name=a=b", "a=b")])
def test_load_snapshot(text: str, snapshot: str) -> None:
    assert image_of("-l", text, "a").snapshot == snapshot


def test_image_trees() -> None:
    tree = '{"driver":"qcow2","file":{"driver":"file","filename":"a"},"backing":null}'
    assert image_of("--discard=unmap", f"json:{tree}") == ImageSpec("a", "qcow2", discard="unmap", backing=None)
    opts = "driver=raw,offset=1M,size=1M,file.driver=file,file.filename=file.raw"
    assert image_of("--image-opts", opts) == ImageSpec("file.raw", "raw", offset=1 << 20, size=1 << 20)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "one image"),
        (["a", "b"], "one image"),
        (["--bogus", "a"], "--bogus"),
        (["-k"], "-k"),
        (["--persistent=2", "a"], "--persistent"),
        (["-P", "1", "a"], "-P"),
        (["-e", "x", "a"], "--shared=x"),
        (["-e", "-1", "a"], "--shared=-1"),
        (["-o", "1x", "a"], "'1x'"),
        (["-p", "70000", "a"], "'70000'"),
        (["-k", "", "a"], "empty"),
        (["--cache=x", "a"], "--cache=x"),
        (["--aio=x", "a"], "--aio=x"),
        (["--discard=x", "a"], "discard mode 'x'"),
        (["--detect-zeroes=x", "a"], "--detect-zeroes=x"),
        (["--detect-zeroes=unmap", "a"], "--discard=unmap"),
        (["-n", "--cache=none", "a"], "only once"),
        pytest.param(["-e", "9" * 5000, "a"], "--shared=9", id="digits"),
        (["-l", "snapshot.id=1,snapshot.name=a", "a"], "either"),
        (["-f", "raw", "--image-opts", "driver=raw,file.filename=a"], "--image-opts"),
        (["--image-opts", "driver=raw,file.filename=a,bogus=1"], "'bogus'"),
        (["--object", "tls-creds-x509,id=t", "a"], "--object tls-creds-x509,id=t: TLS is not supported yet"),
        (["--object", "secret,id=s,data=hush", "a"], "--object secret,id=s,: data= would show the secret"),
        (["--image-opts", "driver=qcow2,file.filename=a,encrypt.key-secret=s"], "no secret of the id 's'"),
        (["--list", "--object", "tls-creds-x509,id=t"], "TLS is not supported yet"),
        (["--tls-creds=t", "a"], "TLS is not supported yet"),
        (["-c", "/dev/nbd0", "a"], "nbd-client"),
        (["null-co://"], "'null-co'"),
        (["--list", "a"], "takes no image"),
        (["--list", "-t"], "--persistent"),
    ],
)
def test_refused(argv: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run_command_line(argv)


def test_secrets_are_named_by_the_image(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    objects = ["--object", f"secret,id=s,file={tmp_path}/one", f"--object=secret,id=t,file={tmp_path}/two"]
    arguments = parse_arguments([*objects, "--image-opts", "driver=qcow2,file.filename=a,encrypt.key-secret=t"])
    assert plan_of(arguments, []).exports[0].image.secret == b"2"
    tree = 'json:{"driver":"qcow2","file.filename":"a","encrypt.key-secret":"s"}'
    assert plan_of(parse_arguments([*objects, tree]), []).exports[0].image.secret == b"1"
    assert plan_of(parse_arguments([*objects, "a"]), []).exports[0].image.secret is None


def test_with_inherited_sockets_there_is_nothing_to_bind() -> None:
    (listener,) = bind(TcpAddress("127.0.0.1", 0))
    assert plan_of(parse_arguments(["a"]), [listener]).listeners == [listener]
    for argv in (["-k", "/s"], ["-b", "::"], ["-p", "1"]):
        with pytest.raises(ConfigError, match="LISTEN_FDS"):
            plan_of(parse_arguments([*argv, "a"]), [listener])
    listener.close()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert run_command_line(["-V"]) == 0
    assert capsys.readouterr().out.startswith("nbdserve-qemu-nbd ")


# --- the process -------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    output("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    return path


@needs_clients
def test_ends_after_the_last_client_but_not_for_a_mere_list(tmp_path: Path, disk: Path) -> None:
    sock = tmp_path / "s"
    uri = f"nbd+unix:///?socket={sock}"
    with started(*QEMU_NBD, "-k", sock, "-f", "qcow2", disk) as server:
        until(lambda: greets(sock), "it answers")
        assert 'export=""' in output("nbdinfo", "--list", uri)
        assert "export: ''" in output(*QEMU_NBD, "--list", "-k", sock)
        assert server.poll() is None
        output("qemu-io", "-f", "raw", "-c", "write -P 0x41 1M 64k", "-c", "flush", uri)
        assert server.wait(SECONDS) == 0
    assert not sock.exists()
    output("qemu-img", "check", disk)
    output("qemu-io", "-f", "qcow2", "-c", "read -P 0x41 1M 64k", disk)


@needs_clients
def test_fork_returns_when_clients_can_connect(tmp_path: Path, disk: Path) -> None:
    sock, pid_file = tmp_path / "s", tmp_path / "pid"
    done = run(*QEMU_NBD, "--fork", "-t", f"--pid-file={pid_file}", "-k", sock, disk)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pid_file.read_text())
    try:
        assert "16777216" in output("nbdinfo", "--size", f"nbd+unix:///?socket={sock}")
        assert is_running(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
    until(lambda: not is_running(pid), "it ends")
    assert not sock.exists()
    assert pid_file.exists()


@pytest.mark.parametrize("fork", [[], ["--fork"]])
def test_failure_to_start_is_told_and_leaves_nothing(tmp_path: Path, fork: list[str]) -> None:
    sock, pid_file = tmp_path / "s", tmp_path / "pid"
    for argv, named in [
        ([tmp_path / "absent"], "absent"),
        (["-k", tmp_path / "no" / "s", os.devnull], "does not exist"),
        (["--pid-file", tmp_path / "no" / "pid", "-f", "raw", __file__, "-r"], "pid file"),
    ]:
        done = run(*QEMU_NBD, *fork, "-k", sock, f"--pid-file={pid_file}", *argv)
        assert done.returncode == 1
        assert done.stdout == ""
        assert named in done.stderr
        assert all(line.startswith("nbdserve-qemu-nbd: ") for line in done.stderr.splitlines())
        assert not sock.exists()
        assert not pid_file.exists()


@needs_clients
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_two_writers_of_one_image_are_refused(tmp_path: Path, format_: str) -> None:
    disk = tmp_path / "disk"
    output("qemu-img", "create", "-q", "-f", format_, disk, "1M")
    with started(*QEMU_NBD, "-t", "-k", tmp_path / "s", "-f", format_, disk) as server:
        until(lambda: greets(tmp_path / "s"), "it answers")
        done = run(*QEMU_NBD, "-k", tmp_path / "s2", "-f", format_, disk)
        assert (done.returncode, "in use" in done.stderr) == (1, True)
        assert run("qemu-io", "-f", format_, "-c", "write 0 512", disk).returncode != 0
        assert stop(server) == 0


@needs_clients
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_with_everything_written(tmp_path: Path, disk: Path, number: int) -> None:
    sock = tmp_path / "s"
    with started(*QEMU_NBD, "-t", "-k", sock, "-f", "qcow2", disk) as server:
        until(lambda: greets(sock), "it answers")
        output("qemu-io", "-f", "raw", "-c", "write -P 0x42 0 1M", f"nbd+unix:///?socket={sock}")
        assert stop(server, number) == 0
    assert not sock.exists()
    output("qemu-img", "check", disk)
    output("qemu-io", "-f", "qcow2", "-c", "read -P 0x42 0 1M", disk)


@needs_clients
def test_shared_1_makes_a_second_client_wait(tmp_path: Path, disk: Path) -> None:
    sock = tmp_path / "s"
    with started(*QEMU_NBD, "-t", "-k", sock, disk) as server:
        until(lambda: greets(sock), "it answers")
        assert "can_multi_conn: false" in output("nbdinfo", f"nbd+unix:///?socket={sock}")
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            first.connect(str(sock))
            assert first.recv(18).startswith(b"NBDMAGIC")
            second.connect(str(sock))
            second.settimeout(0.2)
            with pytest.raises(TimeoutError):
                second.recv(18)
            first.close()
            second.settimeout(SECONDS)
            assert second.recv(18).startswith(b"NBDMAGIC")
        assert stop(server) == 0


@needs("nbdcopy", "qemu-img")
def test_socket_activation(tmp_path: Path, disk: Path) -> None:
    target = tmp_path / "copy.raw"
    output("nbdcopy", "--", "[", *QEMU_NBD, "-f", "qcow2", disk, "]", target)
    assert target.stat().st_size == 16 << 20


@needs_clients
def test_export_name_is_the_only_one(tmp_path: Path, disk: Path) -> None:
    sock = tmp_path / "s"
    with started(*QEMU_NBD, "-t", "-k", sock, "-x", "a/b c", "-D", "text", "-A", "-r", disk) as server:
        until(lambda: greets(sock), "it answers")
        told = output("nbdinfo", f"nbd+unix:///a%2Fb%20c?socket={sock}")
        assert "qemu:allocation-depth" in told
        assert "is_read_only: true" in told
        assert run("nbdinfo", f"nbd+unix:///?socket={sock}").returncode != 0
        assert output(*QEMU_NBD, "-L", "-k", sock).splitlines()[1:3] == [" export: 'a/b c'", "  description: text"]
        assert stop(server) == 0


@needs_clients
def test_trees_and_windows(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(4096) + b"x" * 4096 + bytes(4096))
    sock = tmp_path / "s"
    for argv in (
        ["--offset=4096", "-f", "raw", raw],
        ["--image-opts", f"driver=raw,offset=4096,size=4096,file.driver=file,file.filename={raw}"],
        [f'json:{{"driver":"raw","offset":4096,"file":{{"driver":"file","filename":"{raw}"}}}}'],
    ):
        with started(*QEMU_NBD, "-k", sock, "-r", *argv) as server:
            until(lambda: greets(sock), "it answers")
            output("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x78 0 4096", f"nbd+unix:///?socket={sock}")
            assert server.wait(SECONDS) == 0


@needs_clients
def test_detached_backing_file(tmp_path: Path, disk: Path) -> None:
    top = tmp_path / "top.qcow2"
    output("qemu-io", "-f", "qcow2", "-c", "write -P 0x43 0 64k", disk)
    output("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", top)
    sock = tmp_path / "s"
    for tree, byte in (("", 0x43), (',"backing":null', 0)):
        image = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{top}"}}{tree}}}'
        with started(*QEMU_NBD, "-k", sock, image) as server:
            until(lambda: greets(sock), "it answers")
            output("qemu-io", "-f", "raw", "-c", f"read -P {byte} 0 64k", f"nbd+unix:///?socket={sock}")
            assert server.wait(SECONDS) == 0


@needs_clients
def test_snapshot_drops_the_writes(tmp_path: Path, disk: Path) -> None:
    sock, before = tmp_path / "s", disk.read_bytes()
    with started(*QEMU_NBD, "-s", "-k", sock, disk) as server:
        until(lambda: greets(sock), "it answers")
        commands = ["-c", "write -P 0x44 0 64k", "-c", "read -P 0x44 0 64k"]
        output("qemu-io", "-f", "raw", *commands, f"nbd+unix:///?socket={sock}")
        assert server.wait(SECONDS) == 0
    assert disk.read_bytes() == before
