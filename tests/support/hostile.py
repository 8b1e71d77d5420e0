"""What tests of hostile input share: spoilt files, and a watch over what a loader writes, starts and connects to."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

_WRITES = ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn")
_watch: list[tuple[Path, list[str]]] = []  # where writing is fine, and what was done elsewhere

DEEP = 3000
JSON_VALUES = (  # in place of a value of a JSON file, as text: some are no JSON
    *(
        "null",
        "true",
        "false",
        "-1",
        "0",
        "1",
        "0.5",
        "1e308",
        "-1e308",
        "1e-320",
        "1e999",
        "-1e999",
        "NaN",
        "-Infinity",
    ),
    *(
        "9" * 15,
        "18446744073709551615",
        "9" * 400,
        "9" * 5000,
        '""',
        '"0"',
        '"nan"',
        '"x"',
        "[]",
        "{}",
        "[[]]",
        "[null]",
    ),
    *('["x", 1]', '[["x"]]', '{"x": 1}', '{"": [], "x": {}}', '{"a": 1, "a": 2}', '"../../x"', '"/etc/hostname"'),
    *(
        '"http://evil.test/x"',
        '"<script>alert(1)</script>"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\u001b[31m"',
        '"' + "x" * 9999 + '"',
    ),
    *("[" * DEEP + "]" * DEEP, '{"a":' * 500 + "1" + "}" * 500, "[" * 60 + "]" * 60, "'x'", "nothing"),
)
YAML_VALUES = (
    *(
        "!!python/object/apply:os.mkdir [/tmp/evil]",
        "!!python/name:os.system",
        "!!binary x",
        "!!timestamp x",
        "!!int x",
    ),
    *(
        "!!bool x",
        "!!set {a}",
        "!!omap [a: 1]",
        "&a [*a]",
        "*a",
        "2026-13-45",
        "2026-11-21",
        ".nan",
        ".inf",
        "1:60",
        "~",
    ),
    *(
        "{[1]: 2}",
        "{? [1] : 2}",
        "1_000",
        "0x" + "f" * 5000,
        "{<<: {a: 1}}",
        "{<<: 1}",
        "on",
        "%x",
        "@x",
        "`x",
        "|",
        ">",
    ),
)
BYTES = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b"{}",
    b"[",
    b'"',
    b"\xed\xa0\x80",
    b"\x7fELF",
    b"\x80\x04\x95",
)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watch or not (event == "open" or event in _WRITES or event in _STARTS):
        return
    inside, seen = _watch[-1]
    if event in _STARTS:
        seen.append(f"{event} {arguments[:2]!r}")
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return
    two = event in ("os.rename", "os.link", "os.symlink")
    for place, path in enumerate(arguments[: 2 if two else 1]):
        if not isinstance(path, (str, bytes, os.PathLike)) or "__pycache__" in str(path) or str(path) == os.devnull:
            continue  # a file that is open already; Python's own
        real = Path(os.path.realpath(_folder_of(event, arguments, place) / os.fsdecode(path)))
        if not real.is_relative_to(inside):
            seen.append(f"{event} {real}")


def _folder_of(event: str, arguments: tuple[Any, ...], place: int) -> Path:
    """What a relative path starts from: an open folder, as in shutil.rmtree, or the working directory."""
    handles = arguments[-2:] if event in ("os.rename", "os.link") else arguments[-1:]
    handle = handles[min(place, len(handles) - 1)] if event != "open" else -1
    return Path(os.readlink(f"/proc/self/fd/{handle}")) if type(handle) is int and handle >= 0 else Path.cwd()


sys.addaudithook(_hook)  # stays for the process's life, and does nothing outside of `watched`


@contextmanager
def watched(inside: Path) -> Iterator[None]:
    """Fail if, within, a file outside of a folder is written, or anything is started or connected to."""
    seen: list[str] = []
    _watch.append((inside.resolve(), seen))
    try:
        yield
    finally:
        _watch.pop()
    assert not seen, seen


def refused(call: Callable[[], Any], inside: Path) -> str | None:
    """What a loader says against its input, in one line; None if it takes it. Anything but ValueError and OSError is
    not caught here, nor by `rlg.cli.fail_cleanly`.
    """
    with watched(inside):
        try:
            call()
        except (ValueError, OSError) as error:
            return " ".join(str(error).split())
    return None


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places in a JSON value, those of lists and mappings too."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, each in below for path in paths_of(each, (*here, key)))]


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    row = dict(value) if isinstance(value, dict) else list(value)
    row[path[0]] = _put(value[path[0]], path[1:], new)
    return row


def spoilt_json(value: Any, more: tuple[str, ...] = ()) -> st.SearchStrategy[bytes]:
    """Texts of a JSON value, one or two of whose places hold something else, and of some the bytes are spoilt too."""
    mark = "\N{SNOWMAN}"

    def text(path: tuple[Any, ...], new: str) -> bytes:
        whole = json.dumps(_put(value, path, mark), ensure_ascii=False)
        return whole.replace(f'"{mark}"', new, 1).encode("utf-8", "surrogatepass")

    replaced = st.builds(text, st.sampled_from(paths_of(value)), st.sampled_from(JSON_VALUES + more))
    twice = st.builds(lambda a, b: a[:-1] + b", " + b[1:] if a[-1:] == b"}" == b[-1:] else b, replaced, replaced)
    return st.one_of(replaced, replaced, replaced, twice, replaced.flatmap(spoilt))


def spoilt(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some flipped, cut off, inserted or repeated."""
    places = st.integers(0, max(len(data) - 1, 0))
    flips = st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4)
    return st.one_of(
        flips.map(lambda pairs: _flipped(data, pairs)),
        places.map(lambda place: data[:place]),
        st.builds(lambda place, new: data[:place] + new + data[place:], places, st.sampled_from(BYTES)),
        st.builds(lambda a, b: data[: max(a, b)] + data[min(a, b) :], places, places),
    )


def _flipped(data: bytes, pairs: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for place, value in pairs:
        if changed:
            changed[place] ^= value
    return bytes(changed)


@contextmanager
def at_most(extra: int = 2**30) -> Iterator[None]:
    """Within, this process may have no more than so many further bytes of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def said(call: Callable[[], Any], inside: Path) -> str:
    """How an input is refused, which must write nothing outside of a folder, and take no gigabyte."""
    with at_most():
        text = refused(call, inside)
    assert text, "it was taken"
    return text
