"""Images as the *user* writes them: a file name, ``json:{...}``, or ``--image-opts driver=...,file.filename=...``.

The last two are QEMU's block node trees; the subset that describes an image on a local file is understood, and an
option outside it is an error that names it. Names found in image *headers* never come here: they are plain paths.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from nbdserve.block.spec import DETECT_ZEROES_MODES, ImageSpec
from nbdserve.config.secrets import named_secret
from nbdserve.errors import ConfigError
from nbdserve.formats.registry import DRIVERS
from nbdserve.storage.nbd_target import DEFAULT_PORT, NbdTarget, is_nbd, parse_port, parse_target
from nbdserve.units import parse_size

Tree: TypeAlias = dict[str, Any]
"""A node: option name -> string, number, boolean, null, or the Tree of a child."""

FILE_DRIVERS: Final = frozenset({"file", "host_device"})
PROTOCOL_DRIVERS: Final = FILE_DRIVERS | {"nbd"}

_NO_SECRETS: Final[Mapping[str, bytes]] = MappingProxyType({})

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

_CACHE_FLAGS: Final = {
    # mode: (direct, writeback, no-flush), the meaning qemu(1) gives -drive cache=
    "writeback": (False, True, False),
    "none": (True, True, False),
    "unsafe": (False, True, True),
    "directsync": (True, False, False),
    "writethrough": (False, False, False),
}
_CACHE_MODES: Final = {flags: mode for mode, flags in _CACHE_FLAGS.items()}

_DISCARD: Final = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}


def image_from_filename(text: str, flags: ImageSpec, secrets: Mapping[str, bytes] = _NO_SECRETS) -> ImageSpec:
    """The image named ``text``: a path, ``file:PATH``, an NBD URI or ``json:{...}``.

    ``flags`` carries what the other command-line options say (its path is not used); a ``json:`` tree overrides it,
    except for a format given with ``-f``, as in QEMU. ``secrets`` are those that ``key-secret`` options name, by id.
    ConfigError names the option at fault.
    """
    if text.startswith("json:"):
        return _with_context(text, lambda: _image(_parse_json(text.removeprefix("json:")), flags, secrets, top=True))
    if is_nbd(text):
        target = parse_target(text)
        return replace(flags, path=target.uri, nbd=target)
    return replace(flags, path=_plain_path(text))


def image_from_opts(text: str, flags: ImageSpec, secrets: Mapping[str, bytes] = _NO_SECRETS) -> ImageSpec:
    """The image described by ``key=value,key.subkey=value`` (a comma in a value is written twice)."""
    return _with_context(text, lambda: _image(_nested(_parse_pairs(text)), flags, secrets, top=True))


def snapshot_name(text: str) -> str:
    """The id or name of an internal snapshot: ``text``, or after ``snapshot.id=`` or ``snapshot.name=``.

    ConfigError where it gives both.
    """
    if not text.startswith(("snapshot.id=", "snapshot.name=")):
        return text
    wanted = _parse_pairs(text)
    if len(wanted) != 1:
        raise ConfigError(f"snapshot {text!r}: give either the id or the name")
    return str(wanted.popitem()[1])


def discard_mode(text: str) -> str:
    """``ignore`` or ``unmap`` for one of QEMU's four words for them; ConfigError else."""
    if text not in _DISCARD:
        raise ConfigError(f"invalid discard mode {text!r}: give ignore (off) or unmap (on)")
    return _DISCARD[text]


# --- text to tree ------------------------------------------------------------------------------------------------


def _with_context(text: str, parse: Callable[[], ImageSpec]) -> ImageSpec:
    try:
        return parse()
    except ConfigError as error:
        raise ConfigError(f"image {text!r}: {error}") from None
    except RecursionError:
        raise ConfigError(f"image {text[:80]!r}...: nested too deeply") from None


def _plain_path(text: str) -> str:
    """``text`` as a path; a ``scheme:`` in front names a protocol, and only ``file:`` is one here."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        path = text
    elif scheme[1] == "file":
        path = text.removeprefix("file:")
        if path.startswith("//"):
            path = path.removeprefix("//")
            if not path.startswith("/"):
                raise ConfigError(f"image {text!r}: a file URL names no host; write file:///path")
    else:
        raise ConfigError(
            f"image {text!r}: the protocol {scheme[1]!r} is not supported yet (a file of that name is written ./{text})"
        )
    if not path or "\0" in path:
        raise ConfigError(f"image {text!r}: the file name is empty or contains a NUL")
    return path


def _parse_json(text: str) -> Tree:
    def unique(pairs: list[tuple[str, Any]]) -> Tree:
        tree: Tree = {}
        for key, value in pairs:
            if key in tree:
                raise ConfigError(f"option {key!r} is given twice")
            tree[key] = value
        return tree

    try:
        tree = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise ConfigError(f"not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError("the JSON value is no object")
    return _nested(tree)


def _parse_pairs(text: str) -> Tree:
    pairs: Tree = {}
    for item in text.replace(",,", "\0").split(","):
        key, separator, value = item.replace("\0", ",").partition("=")
        if not separator or not key:
            raise ConfigError(f"{item!r} is no option=value")
        if key in pairs:
            raise ConfigError(f"option {key!r} is given twice")
        pairs[key] = value
    return pairs


def _nested(tree: Tree) -> Tree:
    """``{"file.filename": x}`` as ``{"file": {"filename": x}}``, at every level."""
    result: Tree = {}
    for key, value in tree.items():
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"option {key!r} contradicts {parent!r}")
            node = child
        if isinstance(value, dict):
            child = node.setdefault(leaf, {})
            if not isinstance(child, dict):
                raise ConfigError(f"option {key!r} is given twice")
            child |= _nested(value)
        elif leaf in node:
            raise ConfigError(f"option {key!r} is given twice")
        else:
            node[leaf] = value
    return result


# --- tree to ImageSpec -------------------------------------------------------------------------------------------


class _Options:
    """The options of one node, taken one by one; what is left over at the end is unknown."""

    def __init__(self, tree: Tree, where: str) -> None:
        self._tree = dict(tree)
        self._where = where
        self._known: list[str] = []

    def name(self, key: str) -> str:
        return f"{self._where}{key}"

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"option {self.name(key)!r}: {problem}")

    def take(self, key: str, default: Any = None) -> Any:
        self._known.append(key)
        return self._tree.pop(key, default)

    def has(self, key: str) -> bool:
        self._known.append(key)
        return key in self._tree

    def peek(self, key: str) -> Any:
        return self._tree.get(key)

    def text(self, key: str) -> str | None:
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"{value!r} is no string")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        words = {"on": True, "off": False}
        chosen = words.get(value) if isinstance(value, str) else value
        if not isinstance(chosen, bool):
            raise self.error(key, f"{value!r} is neither on nor off")
        return chosen

    def size(self, key: str) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        try:
            size = parse_size(value) if isinstance(value, str) else value
        except ValueError as error:
            raise self.error(key, f"{error}") from None
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
            raise self.error(key, f"{value!r} is no size in bytes")
        return size

    def child(self, key: str) -> Tree:
        value = self.take(key)
        if isinstance(value, str):
            raise self.error(key, f"{value!r} names a node; describe the image here instead")
        if not isinstance(value, dict):
            raise self.error(key, "missing; it says which file the image is in")
        return value

    def finish(self, driver: str) -> None:
        """ConfigError for the first option nobody took."""
        for key in self._tree:
            near = _near(key, self._known)
            raise self.error(key, f"driver {driver!r} does not have it, or it is not supported yet{near}")


def _near(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known))
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def _image(
    tree: Tree,
    flags: ImageSpec,
    secrets: Mapping[str, bytes],
    where: str = "",
    *,
    top: bool = False,
    named: bool = False,
) -> ImageSpec:
    """``named``: without ``file`` it is the file that the header of the image above names."""
    options = _Options(tree, where)
    driver = options.text("driver")
    if driver in PROTOCOL_DRIVERS:
        # A protocol node where an image is expected is the bytes of the file.
        spec = _file(tree, flags, where)
        return replace(spec, format=flags.format or "raw")
    if driver is not None and driver not in DRIVERS:
        raise options.error("driver", f"the driver {driver!r} is unknown or not supported yet{_near(driver, DRIVERS)}")
    if driver is None and not top:
        raise options.error("driver", "missing: a backing format is never guessed")
    format_ = flags.format or driver
    spec = _generic(options, flags)
    if options.has("file") or not named:
        spec = _below(options.child("file"), spec, secrets, f"{where}file.")
    spec = replace(spec, format=format_)
    if format_ == "raw":
        spec = _window(spec, options.size("offset"), options.size("size"))
    else:
        spec = _children(options, _encryption(options, spec, secrets), secrets, where)
    options.finish(format_ or "file")
    return spec


def _encryption(options: _Options, spec: ImageSpec, secrets: Mapping[str, bytes]) -> ImageSpec:
    """``encrypt.key-secret`` of an image that may be encrypted, or ``key-secret`` of one that is nothing else."""
    if options.has("key-secret"):
        return replace(spec, secret=named_secret(secrets, options.text("key-secret"), options.name("key-secret")))
    if not options.has("encrypt"):
        return spec
    encrypt = _Options(options.child("encrypt"), options.name("encrypt."))
    form = encrypt.text("format")
    if form not in (None, "aes", "luks"):
        raise encrypt.error("format", f"{form!r} is none of aes, luks")
    name = encrypt.text("key-secret")
    if name is None:
        raise encrypt.error("key-secret", "missing; it names the --object that holds the passphrase")
    encrypt.finish("encryption")
    return replace(spec, secret=named_secret(secrets, name, encrypt.name("key-secret")))


def _below(tree: Tree, flags: ImageSpec, secrets: Mapping[str, bytes], where: str) -> ImageSpec:
    """What holds an image's bytes: a file, or the disk of another image."""
    driver = tree.get("driver")
    if not isinstance(driver, str) or driver not in DRIVERS:
        return _file(tree, flags, where)
    below = replace(flags, format=None, offset=0, size=None, detect_zeroes="off")
    file = _image(tree, below, secrets, where)
    return replace(flags, path=file.path, read_only=file.read_only, cache=file.cache, file=file, secret=None)


def _window(spec: ImageSpec, offset: int | None, size: int | None) -> ImageSpec:
    """The window of a raw image, in which that of the command line, if there is one, counts."""
    if offset is None and size is None:
        return spec
    if not spec.offset and spec.size is None:
        return replace(spec, offset=offset or 0, size=size)
    return replace(spec, file=replace(spec, offset=offset or 0, size=size, detect_zeroes="off"))


def _children(options: _Options, spec: ImageSpec, secrets: Mapping[str, bytes], where: str) -> ImageSpec:
    """The other files of an image that has some: ``backing`` and ``data-file``."""
    inherited = ImageSpec(path="", cache=spec.cache, read_only=True)
    if options.has("backing"):
        if options.peek("backing") in (None, ""):
            options.take("backing")
            spec = replace(spec, backing=None)
        else:
            below = _image(options.child("backing"), inherited, secrets, f"{where}backing.", named=True)
            spec = replace(spec, backing=below)
    if options.has("data-file"):
        below = replace(inherited, read_only=spec.read_only, discard=spec.discard)
        data_file = _image(options.child("data-file"), below, secrets, f"{where}data-file.")
        if data_file.format != "raw":
            raise options.error("data-file.driver", f"{data_file.format!r} is no driver of a data file, give 'file'")
        if data_file.offset or data_file.size is not None or data_file.file is not None:
            raise options.error("data-file.offset", "a window of a data file is not supported yet")
        spec = replace(spec, data_file=data_file)
    return spec


def _file(tree: Tree, flags: ImageSpec, where: str) -> ImageSpec:
    """The protocol node: a local file or block device, or an NBD export."""
    options = _Options(tree, where)
    driver = options.text("driver")
    if driver is not None and driver not in PROTOCOL_DRIVERS:
        raise options.error("driver", f"{driver!r} below an image is not supported yet, give 'file' or 'nbd'")
    filename = options.text("filename")
    if driver == "nbd" or (driver is None and filename is not None and is_nbd(filename)):
        target = _nbd(options, filename)
        spec = _generic(options, flags)
        options.finish("nbd")
        return replace(spec, path=target.uri, nbd=target)
    if filename is None:
        raise options.error("filename", "missing")
    if not filename or "\0" in filename:
        raise options.error("filename", "the file name is empty or contains a NUL")
    options.text("aio")
    if options.text("locking") == "off":
        raise options.error("locking", "images are always locked, leave it out")
    spec = _generic(options, flags)
    options.finish(driver or "file")
    return replace(spec, path=filename.removeprefix("file:") if driver is None else filename)


def _nbd(options: _Options, filename: str | None) -> NbdTarget:
    """The options of driver ``nbd``; ``filename`` is a URI, in place of ``server`` and ``export``."""
    delays: dict[str, Any] = {}
    for key in ("reconnect-delay", "open-timeout"):
        seconds = options.take(key, 0)
        if isinstance(seconds, bool) or not str(seconds).isdecimal():
            raise options.error(key, f"{seconds!r} is no number of seconds")
        delays[key.replace("-", "_")] = float(seconds)
    if filename is not None:
        return replace(parse_target(filename), **delays)
    export = options.text("export") or ""
    if options.has("server"):
        server = _Options(options.child("server"), options.name("server."))
        kind = server.text("type")
        if kind == "unix":
            where: dict[str, Any] = {"socket": server.text("path") or ""}
        elif kind == "inet":
            where = {"host": server.text("host") or "", "port": _port(server)}
        else:
            raise server.error("type", f"{kind!r} is none of inet, unix")
        server.finish("nbd")
    elif options.has("path"):
        where = {"socket": options.text("path") or ""}
    else:
        where = {"host": options.text("host") or "", "port": _port(options)}
    if not where.get("socket") and not where.get("host"):
        raise options.error("server", "missing; say type=unix and path, or type=inet, host and port")
    return NbdTarget(export, **where, **delays)


def _port(options: _Options) -> int:
    port = options.take("port", DEFAULT_PORT)
    try:
        return parse_port(str(port))
    except ConfigError as error:
        raise options.error("port", str(error)) from None


def _generic(options: _Options, flags: ImageSpec) -> ImageSpec:
    """The options every node has. ``node-name`` labels and ``auto-read-only`` hints; neither changes what is served."""
    options.text("node-name")
    options.boolean("auto-read-only", False)
    discard, detect_zeroes = options.text("discard"), options.text("detect-zeroes")
    if detect_zeroes is not None and detect_zeroes not in DETECT_ZEROES_MODES:
        raise options.error("detect-zeroes", f"{detect_zeroes!r} is none of {', '.join(DETECT_ZEROES_MODES)}")
    return replace(
        flags,
        read_only=options.boolean("read-only", False) or flags.read_only,
        discard=flags.discard if discard is None else discard_mode(discard),
        detect_zeroes=detect_zeroes or flags.detect_zeroes,
        cache=_cache_mode(options, flags.cache),
    )


def _cache_mode(options: _Options, mode: str) -> str:
    if not options.has("cache"):
        return mode
    cache = _Options(options.child("cache"), options.name("cache."))
    direct, writeback, no_flush = _CACHE_FLAGS[mode]
    flags = (cache.boolean("direct", direct), writeback, cache.boolean("no-flush", no_flush))
    cache.finish("cache")
    if flags not in _CACHE_MODES:
        raise options.error("cache", "direct and no-flush do not go together")
    return _CACHE_MODES[flags]
