"""RLG: align diffusion models with reinforcement learning, and control the alignment at inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlg.attach import Guide, apply

__version__ = "0.1.0"
__all__ = ["Guide", "apply"]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import rlg` does not load torch and diffusers. The module is not called `apply`,
    # because a submodule of that name would hide the function as soon as anybody imported it.
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("rlg.attach"), name)
    raise AttributeError(f"module 'rlg' has no attribute {name!r}")
