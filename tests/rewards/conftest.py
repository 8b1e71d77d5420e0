"""Published rewards that are models, as tiny random checkpoints in their layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards import hpsv2, imagereward
from tests.support import published


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder with everything that the reward reads; tests must not write to it."""
    return published.write_rewards(tmp_path_factory.mktemp("published"))


@pytest.fixture
def tiny_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the architecture is not in the checkpoint, that of `published`; and nothing from the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(hpsv2, "clip_h_config", published.tiny_clip_config)
    monkeypatch.setattr(imagereward, "configs", published.tiny_blip_configs)
