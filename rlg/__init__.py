"""RLG: reinforcement learning for diffusion models, with control at inference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlg import own_packages

if TYPE_CHECKING:
    from rlg import tinyworld
    from rlg.integrations.diffusers import Guide, apply

__version__ = "0.1.0"
__all__ = ["Guide", "__version__", "apply", "tinyworld"]


if own_packages.is_command():
    own_packages.guard()


def __getattr__(name: str) -> Any:
    # Names are resolved on first use, so that `import rlg` does not load torch and diffusers. The module is not called
    # `apply`, because a submodule of that name would hide the function as soon as it is imported.
    if name == "tinyworld":
        return importlib.import_module("rlg.tinyworld")
    if name in __all__:
        return getattr(importlib.import_module("rlg.integrations.diffusers"), name)
    raise AttributeError(f"module 'rlg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
