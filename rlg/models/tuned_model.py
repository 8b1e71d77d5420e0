"""Tuned models, each resolved once.

The record says where an adapter or a full network is, what it holds, and which base it names. A command makes one
record for each model that it is given. The hub is listed when the record is made. An adapter is read and hashed once,
on first use.
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
    """An adapter or a full fine-tuned network.

    `adapter`, `base` and `digest` raise ValueError for damaged files.
    """

    path: str  # the path or hub id that the user gave
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
        """The base model that an adapter names.

        It is None if the adapter names none, and for a full network.
        """
        return None if self.is_network else self.adapter.base

    @cached_property
    def digest(self) -> str | None:
        """Digest of an adapter (weights, settings) or of a full network."""
        if self.is_network:
            inside = [Path(self.path) / name for name in MAIN_DENOISERS if (Path(self.path) / name).is_dir()]
            return fingerprint.of_model(str(inside[0]) if inside else self.path)
        return fingerprint.of_files(adapter_files.with_settings(self.file))


def resolve(tuned: str | Path | TunedModel) -> TunedModel:
    """Find a tuned model by path or hub id.

    A record is returned as it is. Raises ValueError if there is nothing.
    """
    if isinstance(tuned, TunedModel):
        return tuned
    source = hub.source(tuned)
    return TunedModel(str(tuned), source, full_networks.is_network(source))
