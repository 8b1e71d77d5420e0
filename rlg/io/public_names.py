"""Names and settings as others may see them.

Nothing that leaves this machine says where things are here, or which servers are asked. Model cards, pushed adapters,
trackers and reports pass everything through here. A hub id and a tinyworld name are public. Of a path the last part
stays, of a reward with a local model its name; a server's address goes altogether.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rlg.choices import WORLD_MODELS

LOCAL, SERVER = "(local)", "(server)"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_NAMED = re.compile(r"(--)?([A-Za-z_][\w.]*)=(.+)", re.DOTALL)
_PATH = re.compile(r"[/~]|\.{1,2}[/\\]|\\\\|[A-Za-z]:\\")  # how a path begins
_BETWEEN = re.compile(r"([\s\"'`,;()\[\]{}<>|]+)")
_FILES = re.compile(r"\.(txt|jsonl?|csv|tsv|parquet|ya?ml|safetensors|pth?|bin|png|py)(:\d+)?$")
_BASE = "base_model_name_or_path"  # PEFT's name of it


def is_hub_id(name: str, near: Path | None = None) -> bool:
    """Tell whether a name is a repository of the hub.

    It reads as one, and is nothing here, seen from this folder or from one above `near`.
    """
    if _HUB_ID.fullmatch(name) is None or _FILES.search(name):
        return False
    return not any((folder / name).exists() for folder in (Path(), *(near.resolve().parents if near else ())))


def base(name: str, near: Path | None = None) -> str | None:
    """The public name of a base model, None if it has none."""
    return name if name in WORLD_MODELS or is_hub_id(name, near) else None


def value(found: Any, near: Path | None = None) -> Any:
    """A setting, or a mapping of them, as others may see it.

    near: as of `is_hub_id`.
    """
    if isinstance(found, Mapping):
        return {key: value(each, near) for key, each in found.items()}
    if isinstance(found, (list, tuple)):
        return [value(each, near) for each in found]
    return _text(str(found), near) if isinstance(found, (str, Path)) else found


def command(line: str) -> str:
    """A command line as others may see it: it can be pasted, if its paths lie below the folder that it was given in.

    Relative paths stay, and what lies elsewhere keeps its last part.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # not of ours
        return str(value(line))
    return shlex.join(word if _is_below(word) else str(value(word)) for word in words)


def _is_below(word: str) -> bool:
    """Whether a word of a command is a path below the folder that it was given in, or no path."""
    inside = word.rpartition("=")[2]
    return not (_begins_as_path(inside) or _URL.search(word) or "\\" in word or ".." in PurePosixPath(inside).parts)


def _text(text: str, near: Path | None) -> str:
    if match := _NAMED.fullmatch(text):
        option, name, source = match.groups()
        if option:
            return f"--{name}={_text(source, near)}"
        return text if _is_plain(source, near) else name
    if text.startswith("hub:"):
        place, *rest = text.removeprefix("hub:").rsplit(":", 2)
        return ":".join(["hub", place if is_hub_id(place, near) else _last(place), *rest])
    if " + " in text:  # as meta.json names two adapters
        return " + ".join(_text(part, near) for part in text.split(" + "))
    if _begins_as_path(text) and "\n" not in text:
        return _last(text)
    return "".join(_token(part, near) for part in _BETWEEN.split(text))


def _token(text: str, near: Path | None) -> str:
    if _NAMED.fullmatch(text):
        return _text(text, near)
    if _URL.search(text):
        return SERVER
    return text if _is_plain(text, near) else _last(text)


def _is_plain(text: str, near: Path | None) -> bool:
    """Whether a word is no path and no address."""
    if _begins_as_path(text) or _URL.search(text):
        return False
    return is_hub_id(text, near) or not ("/" in text or "\\" in text) or text.startswith("tinyworld:")


def _begins_as_path(text: str) -> bool:
    return (
        text.startswith(("/", "~", "./", "../", ".\\", "..\\", "\\\\")) or re.match(r"[A-Za-z]:\\", text) is not None
    )


def _last(path: str) -> str:
    """The last part of a path.

    `LOCAL` where that is a place rather than a name: a home folder, or what is above.
    """
    name = PurePosixPath(path.replace("\\", "/")).name
    home = Path.home()
    places = {"", ".", "..", "~", home.name} | {f"~{home.name}"}
    return LOCAL if name in places or name.startswith("~") else name


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a file of an adapter without the name of a local base.

    The name may be in its settings (.json) or in the header of its weights.
    """
    if source.suffix == ".json":
        row = json.loads(source.read_bytes())
        hidden = _without_base(row, source)
        if hidden != row:
            target.write_text(json.dumps(hidden, indent=2, sort_keys=True))
            return
    elif source.suffix == ".safetensors" and (header := _header(source)) is not None:
        hidden = {key: _without_base_in_text(text, source) for key, text in header.items()}
        if hidden != header:
            from safetensors.torch import load_file, save_file

            save_file(load_file(source), target, metadata=hidden)
            return
    shutil.copyfile(source, target)


def _header(file: Path) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def _without_base_in_text(text: str, near: Path) -> str:
    try:
        row = json.loads(text)
    except ValueError:
        return text
    return json.dumps(_without_base(row, near), indent=2, sort_keys=True) if isinstance(row, dict) else text


def _without_base(row: Mapping[str, Any], near: Path | None) -> dict[str, Any]:
    """Settings in which a base without a public name is null.

    In a diffusers file the keys begin with a part's name.
    """
    return {k: base(str(v), near) if v and k.rpartition(".")[2] == _BASE else v for k, v in row.items()}
