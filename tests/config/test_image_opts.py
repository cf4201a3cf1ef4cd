import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.spec import ImageSpec
from nbdserve.config.image_opts import discard_mode, image_from_filename, image_from_opts, snapshot_name
from nbdserve.errors import ConfigError
from nbdserve.storage.nbd_target import NbdTarget

NO_FLAGS = ImageSpec(path="")


def from_json(tree: Any, flags: ImageSpec = NO_FLAGS) -> ImageSpec:
    return image_from_filename("json:" + json.dumps(tree), flags)


@pytest.mark.parametrize(
    ("text", "path"),
    [("a.raw", "a.raw"), ("/x/a:b", "/x/a:b"), ("./a:b", "./a:b"), ("file:a", "a"), ("file:///x/a", "/x/a")],
)
def test_plain_names(text: str, path: str) -> None:
    assert image_from_filename(text, NO_FLAGS).path == path


@pytest.mark.parametrize(
    "text", ["", "file:", "a\0b", "nbds://host/x", "nbd://", "null-co://", "https://x/y", "file://host/x"]
)
def test_refused_names(text: str) -> None:
    with pytest.raises(ConfigError):
        image_from_filename(text, NO_FLAGS)


NBD = NbdTarget("disk", "::1", 1234)
SOCKET = NbdTarget("", socket="/run/s", reconnect_delay=5, open_timeout=7)


@pytest.mark.parametrize(
    ("image", "target", "format_"),
    [
        ("nbd://[::1]:1234/disk", NBD, None),
        ({"driver": "nbd", "server": {"type": "inet", "host": "::1", "port": "1234"}, "export": "disk"}, NBD, "raw"),
        ({"driver": "nbd", "host": "::1", "port": 1234, "export": "disk"}, NBD, "raw"),
        ({"driver": "qcow2", "file": {"driver": "nbd", "filename": "nbd://[::1]:1234/disk"}}, NBD, "qcow2"),
        ({"driver": "qcow2", "file": {"filename": "nbd://[::1]:1234/disk"}}, NBD, "qcow2"),
        (
            {
                "driver": "nbd",
                "server.type": "unix",
                "server.path": "/run/s",
                "reconnect-delay": 5,
                "open-timeout": "7",
            },
            SOCKET,
            "raw",
        ),
    ],
)
def test_exports_of_other_servers(image: Any, target: NbdTarget, format_: str | None) -> None:
    spec = image_from_filename(image, NO_FLAGS) if isinstance(image, str) else from_json(image)
    assert (spec.nbd, spec.path, spec.format) == (target, target.uri, format_)


def test_flags_stay() -> None:
    flags = ImageSpec("x", "raw", read_only=True, offset=512, cache="none", discard="unmap", detect_zeroes="unmap")
    assert image_from_filename("x", flags) == flags
    assert from_json({"driver": "raw", "file": {"filename": "x"}}, flags) == flags


@pytest.mark.parametrize(
    ("tree", "spec"),
    [
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}, ImageSpec("a", "qcow2")),
        ({"driver": "qcow2", "file.driver": "host_device", "file.filename": "a"}, ImageSpec("a", "qcow2")),
        ({"driver": "file", "filename": "a"}, ImageSpec("a", "raw")),
        ({"file": {"driver": "file", "filename": "a"}}, ImageSpec("a")),
        (
            {"driver": "raw", "offset": 1536, "size": "1M", "file": {"filename": "a"}},
            ImageSpec("a", "raw", offset=1536, size=1 << 20),
        ),
        (
            {"driver": "qcow2", "file": {"filename": "a"}, "backing": None, "read-only": True, "discard": "unmap",
             "detect-zeroes": "unmap", "node-name": "n"},
            ImageSpec("a", "qcow2", read_only=True, discard="unmap", detect_zeroes="unmap", backing=None),
        ),
        (
            {"driver": "qcow2", "file": {"filename": "a", "aio": "native", "cache": {"direct": True}}},
            ImageSpec("a", "qcow2", cache="none"),
        ),
        ({"driver": "raw", "file.filename": "a", "cache.no-flush": "on"}, ImageSpec("a", "raw", cache="unsafe")),
        (
            {"driver": "qcow2", "file.filename": "a", "data-file": {"driver": "file", "filename": "d"}},
            ImageSpec("a", "qcow2", data_file=ImageSpec("d", "raw")),
        ),
        (
            {"driver": "qcow2", "file.filename": "a",
             "backing": {"driver": "qcow2", "file.filename": "b", "backing": {"driver": "raw", "file.filename": "c"}}},
            ImageSpec(
                "a", "qcow2",
                backing=ImageSpec("b", "qcow2", read_only=True, backing=ImageSpec("c", "raw", read_only=True)),
            ),
        ),
        (
            {"driver": "raw", "offset": 512, "size": 1024, "discard": "unmap", "detect-zeroes": "on",
             "file": {"driver": "qcow2", "file": {"filename": "a"}, "backing": None}},
            ImageSpec(
                "a", "raw", offset=512, size=1024, discard="unmap", detect_zeroes="on",
                file=ImageSpec("a", "qcow2", discard="unmap", backing=None),
            ),
        ),
        (
            {"driver": "qcow2", "file": {"driver": "raw", "offset": 512, "size": "1M", "read-only": True,
                                         "file": {"driver": "file", "filename": "a.tar", "cache": {"direct": True}}}},
            ImageSpec(
                "a.tar", "qcow2", read_only=True, cache="none",
                file=ImageSpec("a.tar", "raw", read_only=True, offset=512, size=1 << 20, cache="none"),
            ),
        ),
    ],
)  # fmt: skip
def test_trees(tree: Any, spec: ImageSpec) -> None:
    assert from_json(tree) == spec


@pytest.mark.parametrize(
    ("tree", "spec"),
    [
        (
            {"driver": "qcow2", "file.filename": "a", "encrypt.format": "luks", "encrypt.key-secret": "s"},
            ImageSpec("a", "qcow2", secret=b"first"),
        ),
        ({"driver": "qcow2", "file.filename": "a", "key-secret": "t"}, ImageSpec("a", "qcow2", secret=b"second")),
        (
            {"driver": "qcow2", "file.filename": "a", "encrypt": {"key-secret": "s"},
             "backing": {"driver": "qcow2", "file.filename": "b", "encrypt": {"format": "aes", "key-secret": "t"}}},
            ImageSpec(
                "a", "qcow2", secret=b"first", backing=ImageSpec("b", "qcow2", read_only=True, secret=b"second")
            ),
        ),
        (
            {"driver": "raw", "file": {"driver": "qcow2", "file.filename": "a", "encrypt.key-secret": "s"}},
            ImageSpec("a", "raw", file=ImageSpec("a", "qcow2", secret=b"first")),
        ),
    ],
)  # fmt: skip
def test_secrets_are_named(tree: Any, spec: ImageSpec) -> None:
    assert image_from_filename(f"json:{json.dumps(tree)}", NO_FLAGS, {"s": b"first", "t": b"second"}) == spec


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"encrypt.key-secret": "x"}, "option 'encrypt.key-secret': there is no secret of the id 'x'"),
        ({"key-secret": "x"}, "option 'key-secret': there is no secret of the id 'x'"),
        ({"encrypt.format": "luks"}, "'encrypt.key-secret': missing"),
        ({"encrypt.format": "rot13", "encrypt.key-secret": "s"}, "'rot13' is none of aes, luks"),
        ({"encrypt.colour": "red", "encrypt.key-secret": "s"}, "'encrypt.colour'"),
    ],
)
def test_secrets_that_are_not_there(tree: Any, problem: str) -> None:
    whole = {"driver": "qcow2", "file.filename": "a"} | tree
    with pytest.raises(ConfigError, match=problem):
        image_from_filename(f"json:{json.dumps(whole)}", NO_FLAGS, {"s": b"first"})


def test_a_secret_of_the_command_line_is_for_the_image_at_the_bottom() -> None:
    flags = ImageSpec("", secret=b"given")
    assert from_json({"driver": "qcow2", "file.filename": "a"}, flags) == ImageSpec("a", "qcow2", secret=b"given")
    tree = {"driver": "raw", "file": {"driver": "qcow2", "file.filename": "a"}}
    assert from_json(tree, flags) == ImageSpec("a", "raw", file=ImageSpec("a", "qcow2", secret=b"given"))


def test_format_on_the_command_line_wins() -> None:
    assert from_json({"driver": "qcow2", "file.filename": "a"}, ImageSpec("", "raw")) == ImageSpec("a", "raw")


def test_the_window_of_the_command_line_is_within_that_of_the_tree() -> None:
    flags = ImageSpec("", offset=512, detect_zeroes="on")
    window = ImageSpec("a", "raw", offset=1024, size=8192)
    assert from_json({"driver": "raw", "offset": 1024, "size": 8192, "file.filename": "a"}, flags) == ImageSpec(
        "a", "raw", offset=512, detect_zeroes="on", file=window
    )
    assert from_json({"driver": "qcow2", "file.filename": "a"}, flags) == ImageSpec(
        "a", "qcow2", offset=512, detect_zeroes="on"
    )
    tree = {"driver": "raw", "file": {"driver": "qcow2", "file.filename": "a"}}
    assert from_json(tree, flags) == ImageSpec("a", "raw", offset=512, detect_zeroes="on", file=ImageSpec("a", "qcow2"))


def test_writeback_is_kept_when_direct_is_set() -> None:
    flags = ImageSpec("", cache="writethrough")
    assert from_json({"driver": "raw", "file.filename": "a", "cache.direct": True}, flags).cache == "directsync"


def test_image_opts() -> None:
    text = "driver=raw,offset=1M,size=64K,file.driver=file,file.filename=a,,b=c.raw,read-only=on"
    assert image_from_opts(text, NO_FLAGS) == ImageSpec("a,b=c.raw", "raw", offset=1 << 20, size=65536, read_only=True)
    assert image_from_opts("driver=qcow2,file.filename=a,backing=", NO_FLAGS).backing is None


def test_a_backing_node_without_a_file_is_the_one_the_header_names() -> None:
    text = "driver=qcow,file.filename=a,backing.driver=qcow,backing.backing.driver=raw,backing.backing.offset=512"
    spec = image_from_opts(text, NO_FLAGS)
    below = ImageSpec("", "raw", read_only=True, offset=512)
    assert spec.backing == ImageSpec("", "qcow", read_only=True, backing=below)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"driver": "qcow2", "file.filename": "a", "bogus": 1}, "'bogus'"),
        ({"driver": "qcow2", "file": {"filename": "a", "bogus": 1}}, r"'file\.bogus'"),
        ({"driver": "qcow2", "file.filename": "a", "offset": 1}, "'offset'"),
        ({"driver": "qcow2", "file.filename": "a", "backng": None}, "did you mean 'backing'"),
        ({"driver": "raw", "file.filename": "a", "cache.drect": True}, r"'cache\.drect'"),
        ({"driver": "raw", "file.filename": "a", "cache": {"direct": True, "no-flush": True}}, "'cache'"),
        ({"driver": "nope", "file.filename": "a"}, "'nope'"),
        ({"driver": "qcow2", "file": {"driver": "ssh", "host": "x"}}, r"'file\.driver': 'ssh'"),
        ({"driver": "qcow2", "file": {"driver": "nbd", "hots": "x"}}, r"'file\.server'"),
        ({"driver": "nbd", "server": {"type": "inet", "host": "x", "port": "0"}}, r"'server\.port'"),
        ({"driver": "nbd", "server": {"type": "fd", "str": "1"}}, r"'server\.type'"),
        ({"driver": "nbd", "server": {"type": "unix"}}, "'server'"),
        ({"driver": "nbd", "path": "/s", "tls-creds": "t"}, "'tls-creds'"),
        ({"driver": "nbd", "path": "/s", "reconnect-delay": -1}, "'reconnect-delay'"),
        ({"driver": "nbd", "path": "/s", "open-timeout": True}, "'open-timeout'"),
        ({"driver": "qcow2", "file": "node0"}, "'node0'"),
        ({"driver": "qcow2"}, "'file'"),
        ({"driver": "qcow2", "file": {}}, r"'file\.filename'"),
        ({"driver": "qcow2", "file.filename": ""}, r"'file\.filename'"),
        ({"driver": "qcow2", "file.filename": 5}, r"'file\.filename'"),
        ({"driver": "qcow2", "file.filename": "a", "read-only": "maybe"}, "'maybe'"),
        ({"driver": "qcow2", "file.filename": "a", "read-only": 1}, "'read-only'"),
        ({"driver": "raw", "file.filename": "a", "size": -1}, "'size'"),
        ({"driver": "raw", "file.filename": "a", "size": True}, "'size'"),
        ({"driver": "raw", "file.filename": "a", "size": "1x"}, "'size'"),
        ({"driver": "raw", "file.filename": "a", "discard": "x"}, "'x'"),
        ({"driver": "raw", "file.filename": "a", "detect-zeroes": "x"}, "'detect-zeroes'"),
        ({"driver": "raw", "file.filename": "a", "file.locking": "off"}, r"'file\.locking'"),
        ({"driver": "qcow2", "file.filename": "a", "backing": {"file.filename": "b"}}, r"'backing\.driver'"),
        ({"driver": "qcow2", "file.filename": "a", "backing": "node1"}, "'node1'"),
        (
            {"driver": "qcow2", "file.filename": "a", "data-file": {"driver": "qcow2", "file.filename": "d"}},
            r"'data-file\.driver'",
        ),
        (
            {"driver": "qcow2", "file.filename": "a", "data-file": {"driver": "raw", "size": 1, "file.filename": "d"}},
            r"'data-file\.offset'",
        ),
        (
            {"driver": "qcow2", "file.filename": "a",
             "data-file": {"driver": "raw", "file": {"driver": "qcow2", "file.filename": "d"}}},
            r"'data-file\.offset'",
        ),
        ({"driver": "raw", "file": {"driver": "qcow2", "offset": 1, "file.filename": "a"}}, r"'file\.offset'"),
        ({"driver": "qcow2", "file": {"driver": "raw", "file": {"bogus": 1}}}, r"'file\.file\.filename'"),
        ({"driver": "qcow2", "file": {"filename": "a"}, "file.filename": "b"}, "twice"),
        ({"driver": "qcow2", "file": "n", "file.filename": "b"}, "contradicts"),
    ],
)  # fmt: skip
def test_the_option_at_fault_is_named(tree: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_json(tree)


@pytest.mark.parametrize(
    "text", ["json:", "json:[]", "json:{bad", 'json:{"driver":"raw","driver":"raw"}', "json:" + '{"a":' * 100000]
)
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^image 'json:"):
        image_from_filename(text, NO_FLAGS)


@pytest.mark.parametrize("text", ["", "a.qcow2", "driver=raw,,", "driver=raw,driver=raw,file.filename=x", "=x"])
def test_bad_image_opts(text: str) -> None:
    with pytest.raises(ConfigError):
        image_from_opts(text, NO_FLAGS)


def test_discard_modes() -> None:
    assert [discard_mode(word) for word in ("ignore", "off", "unmap", "on")] == ["ignore", "ignore", "unmap", "unmap"]
    with pytest.raises(ConfigError, match="'x'"):
        discard_mode("x")


_KEYS = st.sampled_from(
    ["driver", "file", "filename", "file.filename", "backing", "data-file", "offset", "size", "cache", "direct", "x.y"]
)
_VALUES = st.recursive(
    st.sampled_from(["raw", "qcow2", "file", "on", "", "1M"]) | st.none() | st.booleans() | st.integers(),
    lambda children: st.dictionaries(_KEYS, children) | st.lists(children, max_size=2),
    max_leaves=12,
)


def test_snapshots() -> None:
    texts = ("1", "snapshot.id=1", "snapshot.name=a=b", "snapshot.name=a,,b", "id=1,name=a")
    assert [snapshot_name(text) for text in texts] == ["1", "1", "a=b", "a,b", "id=1,name=a"]
    for text in ("snapshot.id=1,snapshot.name=a", "snapshot.id=1,x"):
        with pytest.raises(ConfigError):
            snapshot_name(text)


@given(_VALUES)
def test_any_tree_is_an_image_or_a_config_error(tree: Any) -> None:
    try:
        spec = from_json(tree)
    except ConfigError:
        return
    assert spec.path


@given(st.text(alphabet='driver=raw,file.name\0:{}"', max_size=60))
def test_any_text_is_an_image_or_a_config_error(text: str) -> None:
    for parse in (image_from_opts, image_from_filename):
        try:
            spec = parse(text, NO_FLAGS)
        except ConfigError:
            continue
        assert spec.path
