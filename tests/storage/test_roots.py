"""Names in image headers: what may be opened, and every way out that is shut."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.storage import roots as roots_module
from nbdserve.storage.roots import ImageRoots


@pytest.fixture(params=["openat2", "no-openat2"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with the kernel's resolution and with the walk of an old kernel."""
    if request.param == "no-openat2":

        def missing(*_: object) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(roots_module, "openat2", missing)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``secret`` beside the root ``images`` with ``base.raw``, ``vm/top.qcow2`` and ``vm/base.raw``."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "images/vm").mkdir(parents=True)
    (tmp_path / "images/base.raw").write_text("base")
    (tmp_path / "images/vm/top.qcow2").write_text("top")
    (tmp_path / "images/vm/base.raw").write_text("vm base")
    return tmp_path


def opened(roots: ImageRoots, name: str, image: Path) -> str:
    fd = roots.open_beneath(name, relative_to=str(image), flags=os.O_RDONLY)
    with os.fdopen(fd) as file:
        return file.read()


def refusal(roots: ImageRoots, name: str, image: Path) -> str:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        roots.open_beneath(name, relative_to=str(image), flags=os.O_RDONLY)
    assert len(os.listdir("/proc/self/fd")) <= before
    message = str(caught.value)
    assert message.startswith(f"{image}: backing file = {name!r}: ")
    assert caught.value.field == "backing file"
    assert caught.value.value == name
    return message


def test_names_below_the_root(tree: Path) -> None:
    roots, image = ImageRoots([tree / "images"]), tree / "images/vm/top.qcow2"
    assert opened(roots, "base.raw", image) == "vm base"
    assert opened(roots, "./base.raw", image) == "vm base"
    assert opened(roots, "../base.raw", image) == "base"
    assert opened(roots, "../vm/../vm//base.raw", image) == "vm base"
    assert opened(roots, str(tree / "images/base.raw"), image) == "base"


def test_the_root_of_an_image_is_its_directory(tree: Path) -> None:
    image = tree / "images/vm/top.qcow2"
    roots = ImageRoots.of_image(str(image))
    assert opened(roots, "base.raw", image) == "vm base"
    assert "leads outside the image roots" in refusal(roots, "../base.raw", image)


def test_an_image_named_without_a_directory(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "images/vm")
    assert opened(ImageRoots.of_image("top.qcow2"), "base.raw", Path("top.qcow2")) == "vm base"


@pytest.mark.parametrize(
    "name",
    ["../../secret", "../../../../../../../../etc/passwd", "/etc/passwd", "vm/../../secret", "..", "../..", "/"],
)
def test_escapes_are_refused(tree: Path, name: str) -> None:
    image = tree / "images/vm/top.qcow2"
    refusal(ImageRoots([tree / "images"]), name, image)


def test_an_absolute_name_that_only_begins_like_the_root(tree: Path) -> None:
    (tree / "images-other").mkdir()
    (tree / "images-other/file").write_text("other")
    image = tree / "images/vm/top.qcow2"
    roots = ImageRoots([tree / "images"])
    assert "leads outside" in refusal(roots, str(tree / "images-other/file"), image)
    assert "leads outside" in refusal(roots, f"{tree}/images/../secret", image)
    assert "leads outside" in refusal(roots, str(tree / "secret"), image)


def test_a_name_outside_is_not_looked_up(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be on an automounted or a dead file system."""
    looked_up: list[str] = []
    lstat = os.lstat

    def recording(path: str) -> os.stat_result:
        looked_up.append(path)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", recording)
    image = tree / "images/vm/top.qcow2"
    assert "leads outside" in refusal(ImageRoots([tree / "images"]), "/net/elsewhere/file", image)
    assert looked_up
    assert not any(path.startswith("/net") for path in looked_up)


def test_links(tree: Path) -> None:
    image = tree / "images/vm/top.qcow2"
    roots = ImageRoots([tree / "images"])
    links = tree / "images/vm"
    (links / "inside").symlink_to("../base.raw")
    (links / "inside-absolute").symlink_to(tree / "images/base.raw")
    (links / "chain").symlink_to("inside")
    (links / "directory").symlink_to(tree / "images", target_is_directory=True)
    (links / "outside").symlink_to("../../secret")
    (links / "outside-absolute").symlink_to(tree / "secret")
    (links / "up").symlink_to(tree, target_is_directory=True)
    (links / "loop").symlink_to("loop")
    for name in ("inside", "inside-absolute", "chain", "directory/base.raw"):
        assert opened(roots, name, image) == "base"
    for name in ("outside", "outside-absolute", "up/secret", "directory/../secret"):
        assert "leads outside" in refusal(roots, name, image)
    refusal(roots, "loop", image)


def test_the_root_may_be_a_link(tree: Path) -> None:
    (tree / "link").symlink_to("images", target_is_directory=True)
    roots = ImageRoots([tree / "link"])
    assert opened(roots, "base.raw", tree / "link/vm/top.qcow2") == "vm base"
    assert opened(roots, str(tree / "link/base.raw"), tree / "images/vm/top.qcow2") == "base"
    assert opened(roots, str(tree / "images/base.raw"), tree / "link/vm/top.qcow2") == "base"
    refusal(roots, "../../secret", tree / "link/vm/top.qcow2")


def test_several_roots(tree: Path) -> None:
    (tree / "bases").mkdir()
    (tree / "bases/os.raw").write_text("os")
    roots, image = ImageRoots([tree / "images/vm", tree / "bases"]), tree / "images/vm/top.qcow2"
    assert opened(roots, str(tree / "bases/os.raw"), image) == "os"
    assert opened(roots, "../../bases/os.raw", image) == "os"
    refusal(roots, "../base.raw", image)


def test_no_roots_open_nothing(tree: Path) -> None:
    refusal(ImageRoots([]), "base.raw", tree / "images/vm/top.qcow2")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}',
        "json:{}",
        "nbd://localhost/disk",
        "nbd:unix:/run/socket",
        "file:base.raw",
        "http://example.org/x",
        "fat:rw:.",
        "C:base.raw",
        ":base.raw",
        "new\nline:x",
    ],
)
def test_protocols_are_refused(tree: Path, name: str) -> None:
    assert "never followed" in refusal(ImageRoots([tree]), name, tree / "images/vm/top.qcow2")


def test_a_colon_after_a_slash_is_a_file_name(tree: Path) -> None:
    (tree / "images/vm/a:b").write_text("colon")
    assert opened(ImageRoots([tree]), "./a:b", tree / "images/vm/top.qcow2") == "colon"


@pytest.mark.parametrize("name", ["", "base.raw\0", "\0", "x" * 300, "x/" * 3000, "missing", "base.raw/x"])
def test_what_is_no_name(tree: Path, name: str) -> None:
    refusal(ImageRoots([tree / "images"]), name, tree / "images/vm/top.qcow2")


def test_what_is_no_image(tree: Path) -> None:
    directory = tree / "images/vm"
    os.mkfifo(directory / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket"))
        for name in ("fifo", "socket", ".", "../vm"):
            refusal(ImageRoots([tree / "images"]), name, directory / "top.qcow2")


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "/proc/self/mem", "/proc/version", "/sys/kernel/notes"])
def test_kernel_trees_need_a_root_of_their_own(tree: Path, name: str) -> None:
    image = tree / "images/vm/top.qcow2"
    refusal(ImageRoots([Path("/")]), name, image)
    (tree / "images/vm/link").symlink_to(name)
    refusal(ImageRoots([Path("/")]), "link", image)


def test_a_root_inside_a_kernel_tree_is_followed(tree: Path) -> None:
    if not Path("/proc/sys/kernel/ostype").is_file():
        pytest.skip("no /proc")
    roots = ImageRoots([Path("/proc/sys/kernel")])
    assert opened(roots, "/proc/sys/kernel/ostype", tree / "images/vm/top.qcow2") == "Linux\n"


def test_the_file_system_as_root_opens_everything_else(tree: Path) -> None:
    assert opened(ImageRoots([Path("/")]), str(tree / "secret"), tree / "images/vm/top.qcow2") == "secret"


def test_magic_links_lead_nowhere(tree: Path) -> None:
    with open(tree / "secret") as file:
        name = f"/proc/self/fd/{file.fileno()}"
        refusal(ImageRoots([tree / "images"]), name, tree / "images/vm/top.qcow2")


def test_a_bad_root_is_named(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"image root .*missing"):
        ImageRoots([tree / "missing"])
    with pytest.raises(ConfigError, match="is not a directory"):
        ImageRoots([tree / "secret"])


def test_write_access_is_asked_for(tree: Path) -> None:
    fd = ImageRoots([tree]).open_beneath("base.raw", relative_to=str(tree / "images/vm/top.qcow2"), flags=os.O_RDWR)
    assert os.pwrite(fd, b"x", 0) == 1
    os.close(fd)


def test_the_field_is_the_callers(tree: Path) -> None:
    with pytest.raises(ImageError, match="data file = ''"):
        ImageRoots([tree]).open_beneath("", relative_to="image", flags=os.O_RDONLY, field="data file")


def test_a_link_that_is_swapped_all_the_time_never_leads_out(tree: Path) -> None:
    image = tree / "images/vm/top.qcow2"
    roots = ImageRoots([tree / "images"])
    link, spare = tree / "images/vm/link", tree / "images/vm/spare"
    targets = [tree / "images/base.raw", tree / "secret", Path("../base.raw"), Path("../../secret")]
    link.symlink_to(targets[0])
    stop = threading.Event()

    def swap() -> None:
        turn = 0
        while not stop.is_set():
            spare.symlink_to(targets[turn % 4])
            spare.replace(link)
            turn += 1

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        for _ in range(1500):
            try:
                seen.add(opened(roots, "link", image))
            except ImageError:
                seen.add("refused")
    finally:
        stop.set()
        swapper.join()
    assert "secret" not in seen
    assert {"base", "refused"} & seen
