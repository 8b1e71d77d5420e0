"""Digests of the files that results are made of.

A path says where a file was, and not what it contains. An evaluation, a training and an oracle record digests. A
command that continues one of them compares the digests, and refuses if a file of the same name has changed. The hub's
cache names its files by their sha256, which is used for them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub

from rlg import __version__, tinyworld
from rlg.io.parsing import read_json
from rlg.io.run_folder import AVERAGE, STATE
from rlg.models import hub

if TYPE_CHECKING:  # rlg.status must not load torch, which takes seconds
    from rlg.prompts import Prompt

DIGESTS, VERSIONS = "digests", "versions"  # keys of a record
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
_OF_MODELS = (".safetensors", ".json", ".txt", ".model", *hub.PICKLES)  # weights of rewards are .pt files
_BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache names a large file by its sha256
_BLOCK, _READERS = 2**20, 4
_SMALL = 2**24  # bytes; a larger file is read again only if its size or time changes
_ENDS = 2**20  # bytes read at each end of a data set's large file, where a parquet file has its statistics
_WHOLE = 2**30  # bytes; a larger data set is not read as a whole

Record = dict[str, dict[str, str]]


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of rlg, the libraries that decide numbers, and more packages.

    A package that is not installed is left out.
    """
    found = {"rlg": __version__}
    for name in dict.fromkeys((*LIBRARIES, *more)):
        if importlib.util.find_spec(name):
            found[name] = _version(name)
    return found


@lru_cache(maxsize=1)
def _distributions() -> Mapping[str, list[str]]:
    """Distributions by module; cached, because reading them takes a second."""
    return importlib.metadata.packages_distributions()


def _version(module: str) -> str:
    names = _distributions().get(module, [module])
    return importlib.metadata.version(names[0])


def record(
    tuned: Mapping[str, str | None],
    base: str,
    prompts: Mapping[str, Sequence[Prompt]],
    rewards: Mapping[str, str] | None = None,
    packages: Iterable[str] = (),
) -> Record:
    """Digests and versions of the parts of some results.

    A part that is None, or that is not on this machine, is left out. tuned: digests (`TunedModel.digest`) of adapters
    and full networks. prompts: prompt sets. rewards: places of the rewards' models. The keys are names of the parts.
    """
    digests = {**tuned, "base": of_model(base)} | {name: of_prompts(rows) for name, rows in prompts.items()}
    digests |= {f"reward {name}": of_model(place) for name, place in (rewards or {}).items()}
    return {DIGESTS: {name: value for name, value in digests.items() if value}, VERSIONS: versions(packages)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of two records, in words.

    A part that only one of them has is no difference.
    """
    pairs = [(part, name, _of(before, part).get(name), value) for part in now for name, value in now[part].items()]
    return [
        f"{name} is not what it was (sha256 {was[:12]}, now {value[:12]})"
        if part == DIGESTS
        else f"{name} was {was}, and is {value}"
        for part, name, was, value in pairs
        if was is not None and was != value
    ]


def _of(record: Mapping[str, Any], part: str) -> dict[str, str]:
    found = record.get(part)
    return {k: str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def check(where: str | Path, before: Mapping[str, Any], now: Mapping[str, Any], instead: str) -> None:
    """Raise ValueError if two records differ.

    It warns if the earlier record has no digests. instead: advice for the message.
    """
    if changed := differences(before, now):
        raise ValueError(f"{where} was made of something else: {'; '.join(changed)}; {instead}")
    if not _of(before, DIGESTS) and now.get(DIGESTS):
        warnings.warn(f"{where} does not say what it was made of: see to it that nothing has changed", stacklevel=3)


def base_of(adapter: str | Path) -> str | None:
    """Digest of the base that an adapter was trained on.

    It is None if the adapter's folder does not have it.
    """
    for name in (STATE, AVERAGE):
        file = Path(adapter) / name
        if file.is_file():
            return _of(read_json(file), DIGESTS).get("base")
    return None


def of_prompts(prompts: Sequence[Prompt]) -> str:
    """Digest of prompts and metadata, independent of their file."""
    rows = [[prompt.text, prompt.metadata] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()


def of_model(place: str) -> str | None:
    """Digest of a model, or None if there is none.

    place: a file, a folder, a hub id whose files are in the cache, or a tinyworld's name.
    """
    if place in tinyworld.NAMES:
        place = str(tinyworld.path(place))
    path = Path(place).expanduser()
    if path.is_file():
        return of_files({path.name: path})
    root = path if path.is_dir() else _cached(place)
    return of_files(_model_files(root)) if root else None


def _cached(place: str) -> Path | None:
    match = hub.ID.fullmatch(place)
    if match is None:
        return None
    try:
        root = Path(huggingface_hub.snapshot_download(match["repo"], local_files_only=True))
    except Exception:  # the hub does not say what it raises
        return None
    return root / match["inner"] if match["inner"] else root


def _model_files(root: Path) -> dict[str, Path]:
    if root.is_file():
        return {root.name: root}
    found = [path for pattern in ("*", "*/*") for path in root.glob(pattern)]
    seen = {path.relative_to(root).as_posix(): path for path in found if path.suffix in _OF_MODELS and path.is_file()}
    return {name: path for name, path in seen.items() if not name.startswith(".")}


def of_data(place: str | Path) -> str | None:
    """Digest of a data set's files, or None for a remote one.

    Of a set over 1 GiB, each file's size and its two ends count.
    """
    path = Path(place).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    kept = {file.relative_to(path.parent).as_posix(): file for file in files if not file.name.startswith(".")}
    large = sum(file.stat().st_size for file in kept.values()) > _WHOLE
    return of_files(kept, ends_over=2 * _ENDS if large else None)


def of_files(files: Mapping[str, Path], ends_over: int | None = None) -> str | None:
    """Digest (sha256) of names and contents, or None without files.

    ends_over: a file with more bytes than this counts with its size and its two ends, and not as a whole. Raises
    OSError for a file that cannot be read.
    """
    if not files:
        return None
    with ThreadPoolExecutor(_READERS) as pool:
        names = sorted(files)
        digests = pool.map(lambda name: _of_file(files[name], ends_over), names)
        rows = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return hashlib.sha256(rows.encode()).hexdigest()


def _of_file(path: Path, ends_over: int | None) -> str:
    real = path.resolve()
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
        return real.name
    stat = real.stat()
    read = _read_once if stat.st_size > _SMALL else _read
    return read(real, stat.st_size, stat.st_mtime_ns, ends_over is not None and stat.st_size > ends_over)


def _read(path: Path, size: int, changed: int, ends: bool) -> str:
    """The file's sha256.

    `changed` is part of the cache key of `_read_once`.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if ends:
            digest.update(f"{size}\n".encode() + file.read(_ENDS))
            file.seek(-_ENDS, 2)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


_read_once = lru_cache(maxsize=4096)(_read)
