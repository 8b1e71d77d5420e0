"""Where a model's files are: a path on this machine, or a hub id, of which only the files in use are downloaded.

A hub id is USER/REPO, with a folder or a file of the repository behind it where that is needed
(USER/REPO/FILE.safetensors). Offline, what the hub's cache holds is what there is.
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
    """A folder of files, here or in a repository of the hub, and maybe one file of it that was asked for."""

    repo: str | None  # a hub repository, or None for a folder of this machine
    folder: str  # path of the folder, on this machine or in the repository
    files: frozenset[str]  # in the folder and the folders in it, "/" between
    file: str | None = None  # the file that was named itself

    def where(self, name: str = "") -> str:
        """A file, or the folder, as a user knows it."""
        return "/".join(part for part in (self.repo, self.folder.rstrip("/"), name) if part)

    def fetch(self, *names: str) -> Path:
        """The folder on this machine, with these files in it at least. Raises ValueError if the hub gives none."""
        if self.repo is None:
            return Path(self.folder)
        inside = [f"{self.folder}/{name}".lstrip("/") for name in names]
        try:
            paths = [huggingface_hub.hf_hub_download(self.repo, name) for name in inside]
        except Exception as error:  # the hub raises whatever it meets
            raise ValueError(f"cannot get {self.where(names[0])} from the hub: {short(error)}") from error
        return Path(paths[0]).parents[names[0].count("/")]

    def pickles(self) -> list[str]:
        """The files that are pickles by their names."""
        return sorted(name for name in self.files if name.endswith(PICKLES))


def is_id(path: str | Path) -> bool:
    """Whether something that is not here reads as a hub id; `runs/x` does not, where there is a folder `runs`."""
    path = Path(path)
    return not path.exists() and ID.fullmatch(str(path)) is not None and not Path(path.parts[0]).exists()


def source(path: str | Path | Source) -> Source:
    """The files of a path or a hub id; a source as it is. Raises ValueError if there is nothing."""
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
    """Names of a repository's files, of those in the cache if the hub can't be reached. Raises ValueError."""
    try:
        return frozenset(huggingface_hub.list_repo_files(repo))
    except Exception as error:  # the hub raises whatever it meets
        try:
            folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except Exception:
            raise ValueError(f"no such checkpoint: {repo} is not here, and of the hub: {short(error)}") from error
    return frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def short(error: Exception) -> str:
    """What went wrong, in one line of a readable length."""
    return textwrap.shorten(str(error), 160)
