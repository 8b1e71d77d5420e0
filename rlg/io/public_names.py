"""Names and settings as others may see them.

Nothing that leaves this machine names its folders or the servers that it asks. Model cards, pushed adapters, trackers
and reports pass their texts through this module. A hub id and a tinyworld name are public. A path keeps its last part,
and a reward with a local model keeps its name. A server's address is removed.
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
_BETWEEN = re.compile(r"([\s\"'`,;()\[\]{}<>|]+)")
_FILES = re.compile(r"\.(txt|jsonl?|csv|tsv|parquet|ya?ml|safetensors|pth?|bin|png|py)(:\d+)?$")
_BASE = "base_model_name_or_path"  # PEFT's key of the base model


def is_hub_id(name: str, near: Path | None = None) -> bool:
    """Tell whether a name is a repository of the hub.

    It must look like one. No such path may exist, seen from the working directory or from a folder above `near`.
    """
    if _HUB_ID.fullmatch(name) is None or _FILES.search(name):
        return False
    return not any((folder / name).exists() for folder in (Path(), *(near.resolve().parents if near else ())))


def base(name: str, near: Path | None = None) -> str | None:
    """The public name of a base model, or None."""
    return name if name in WORLD_MODELS or is_hub_id(name, near) else None


def value(found: Any, near: Path | None = None) -> Any:
    """A setting, or a mapping of settings, as others may see it.

    near: as in `is_hub_id`.
    """
    if isinstance(found, Mapping):
        return {key: value(each, near) for key, each in found.items()}
    if isinstance(found, (list, tuple)):
        return [value(each, near) for each in found]
    return _text(str(found), near) if isinstance(found, (str, Path)) else found


def command(line: str) -> str:
    """A command line as others may see it.

    A relative path below the working directory stays, so that the line can be pasted. Any other path keeps its last
    part.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # this project did not write the line
        return str(value(line))
    return shlex.join(word if _is_below(word) else str(value(word)) for word in words)


def _is_below(word: str) -> bool:
    """Tell whether a word holds no path out of the working directory."""
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
    if " + " in text:  # meta.json joins two adapters so
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
    """Tell whether a word is neither a path nor an address."""
    if _begins_as_path(text) or _URL.search(text):
        return False
    return is_hub_id(text, near) or not ("/" in text or "\\" in text) or text.startswith("tinyworld:")


def _begins_as_path(text: str) -> bool:
    return (
        text.startswith(("/", "~", "./", "../", ".\\", "..\\", "\\\\")) or re.match(r"[A-Za-z]:\\", text) is not None
    )


def _last(path: str) -> str:
    """The last part of a path.

    It is `LOCAL` if that part says where something is: a home folder, or a folder above it.
    """
    name = PurePosixPath(path.replace("\\", "/")).name
    home = Path.home()
    places = {"", ".", "..", "~", home.name} | {f"~{home.name}"}
    return LOCAL if name in places or name.startswith("~") else name


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a file of an adapter, without a local base's name.

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

    In a file of diffusers, a key begins with the name of a part.
    """
    return {k: base(str(v), near) if v and k.rpartition(".")[2] == _BASE else v for k, v in row.items()}
