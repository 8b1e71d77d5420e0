"""The environment of all tests (no network, no tracker's server, a sane number of threads), and tiny policies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before torch and the hub's libraries are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))  # tiny models lose time on more

import pytest
import torch

from rlg.policy import Policy
from rlg.tinyworld import models


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a randomly initialised pipeline of a family, in the format that users have, made once."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(family: str) -> Path:
        target = root / family
        if not target.exists():
            torch.manual_seed(0)
            pipe = models.build(family)
            for parameter in pipe.components[_denoiser(pipe)].parameters():
                if not parameter.any():  # zero-initialised layers would make every output 0
                    torch.nn.init.normal_(parameter, std=0.02)
            models.save(pipe, target)
        return target

    return folder


def _denoiser(pipe: object) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


@pytest.fixture(params=models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each model family in turn."""
    return request.param


@pytest.fixture
def tiny_policy(tiny_folder: Callable[[str], Path]) -> Callable[..., Policy]:
    """A random policy of a family, with a LoRA that is not zero unless `fresh` says so."""

    def make(family: str, fresh: bool = False) -> Policy:
        policy = Policy.load(str(tiny_folder(family)))
        torch.manual_seed(1)
        for parameter in policy.add_lora(rank=4, alpha=8):
            if not fresh:
                torch.nn.init.normal_(parameter, std=0.05)
        return policy

    return make
