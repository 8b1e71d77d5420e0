"""Small captioned worlds, and base models of them that ship."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlg.choices import WORLD_MODELS

NAMES = WORLD_MODELS
_WEIGHTS = Path(__file__).parent / "weights"


def path(name: str) -> Path:
    """Folder of a tinyworld pipeline, for `from_pretrained`. Raises ValueError for an unknown name.

    tiny-sdxl is randomly initialised (it exists to run the SDXL conventions), so it is made on first use, from a fixed
    seed, in the user's cache instead of being shipped.
    """
    if name not in NAMES:
        raise ValueError(f"unknown tinyworld model {name!r}; known: {', '.join(NAMES)}")
    return _random_sdxl() if name == "tiny-sdxl" else _WEIGHTS / name


def _random_sdxl() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlg" / "tiny-sdxl-1"
    if not (cache / "model_index.json").is_file():
        import torch

        from rlg.tinyworld.networks import build, save

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build("sdxl")
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
        save(pipe, temporary)
        try:
            temporary.rename(cache)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    return cache
