"""Places of a model's files: a local path or a hub id.

A hub id is USER/REPO. A folder or a file of the repository may follow it (USER/REPO/FILE.safetensors). Only the files
in use are downloaded. Offline, only the hub's cache is used.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS = ".safetensors"
ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<inner>.+))?")


@dataclass(frozen=True)
class Source:
    """A folder of files, on this machine or in a hub repository.

    The user may have asked for one file of it.
    """

    repo: str | None  # a hub repository, or None for a folder on this machine
    folder: str  # path of the folder, on this machine or in the repository
    files: frozenset[str]  # paths below the folder, with "/"
    file: str | None = None  # the file that the user named, if any

    def where(self, name: str = "") -> str:
        """A file or the folder, in the words of a user."""
        return "/".join(part for part in (self.repo, self.folder.rstrip("/"), name) if part)

    def fetch(self, *names: str) -> Path:
        """The folder on this machine, with at least these files in it.

        Raises ValueError if the hub does not give a file.
        """
        if self.repo is None:
            return Path(self.folder)
        inside = [f"{self.folder}/{name}".lstrip("/") for name in names]
        try:
            paths = [huggingface_hub.hf_hub_download(self.repo, name) for name in inside]
        except Exception as error:  # the hub does not say what it raises
            raise ValueError(f"cannot get {self.where(names[0])} from the hub: {short(error)}") from error
        return Path(paths[0]).parents[names[0].count("/")]

    def pickles(self) -> list[str]:
        """The files that are pickles, by their suffixes."""
        return sorted(name for name in self.files if name.endswith(PICKLES))


def is_id(path: str | Path) -> bool:
    """Tell whether a name that is no path is a hub id.

    `runs/x` is none if there is a folder `runs`.
    """
    path = Path(path)
    return not path.exists() and ID.fullmatch(str(path)) is not None and not Path(path.parts[0]).exists()


def source(path: str | Path | Source) -> Source:
    """The files of a path or a hub id.

    A source is returned as it is. Raises ValueError if there is nothing.
    """
    if isinstance(path, Source):
        return path
    here = Path(path)
    if here.is_file():
        return Source(None, str(here.parent), frozenset([here.name]), here.name)
    if here.is_dir():
        found = [file for pattern in ("*", "*/*") for file in here.glob(pattern) if file.is_file()]
        return Source(None, str(here), frozenset(file.relative_to(here).as_posix() for file in found))
    match = ID.fullmatch(str(path))
    if not is_id(path) or match is None:
        raise ValueError(f"no such checkpoint: {path}")
    repo, inner = match["repo"], match["inner"] or ""
    files = _repository(repo)
    file = inner.rpartition("/")[2] if inner in files else None
    folder = inner.rpartition("/")[0] if file else inner
    start = f"{folder}/" if folder else ""
    within = frozenset(name.removeprefix(start) for name in files if name.startswith(start))
    if not within:
        raise ValueError(f"no such checkpoint: {repo} on the hub holds no {inner}")
    return Source(repo, folder, within, file)


def _repository(repo: str) -> frozenset[str]:
    """Names of a repository's files.

    They come from the cache if the hub cannot be reached. Raises ValueError if that has none.
    """
    try:
        return frozenset(huggingface_hub.list_repo_files(repo))
    except Exception as error:  # the hub does not say what it raises
        try:
            folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except Exception:
            raise ValueError(f"no such checkpoint: {repo} is not here, and of the hub: {short(error)}") from error
    return frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def short(error: Exception) -> str:
    """The message of an error, shortened to one readable line."""
    return textwrap.shorten(str(error), 160)
