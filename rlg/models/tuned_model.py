"""A tuned model, found once: where an adapter or a full network is, what it holds, and which base it names.

A command resolves each model that it is given, and hands the record on. The hub is listed when the record is made;
an adapter is read, and its files are hashed, when they are first asked for, and once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlg.models import adapter_files, fingerprint, full_networks, hub
from rlg.models.adapter_files import AdapterFile
from rlg.models.backbones.networks import MAIN_DENOISERS


@dataclass(frozen=True, eq=False)
class TunedModel:
    """An adapter or a full fine-tuned network. `adapter`, `base` and `digest` raise ValueError for damaged files."""

    path: str  # as it was given: a path, or a hub id
    source: hub.Source  # its files
    is_network: bool  # a full network, not an adapter

    @cached_property
    def file(self) -> Path:
        """The file of an adapter's weights, on this machine."""
        return adapter_files.find(self.source)

    @cached_property
    def adapter(self) -> AdapterFile:
        """The adapter itself."""
        return adapter_files.read_file(self.file, self.path)

    @property
    def base(self) -> str | None:
        """The base model that an adapter names; None where it names none, and for a full network."""
        return None if self.is_network else self.adapter.base

    @cached_property
    def digest(self) -> str | None:
        """Digest of an adapter (weights, settings) or of a full network."""
        if self.is_network:
            inside = [Path(self.path) / name for name in MAIN_DENOISERS if (Path(self.path) / name).is_dir()]
            return fingerprint.of_model(str(inside[0]) if inside else self.path)
        return fingerprint.of_files(adapter_files.with_settings(self.file))


def resolve(tuned: str | Path | TunedModel) -> TunedModel:
    """Find a tuned model by path or hub id; what is found already stays. Raises ValueError if there is nothing."""
    if isinstance(tuned, TunedModel):
        return tuned
    source = hub.source(tuned)
    return TunedModel(str(tuned), source, full_networks.is_network(source))
