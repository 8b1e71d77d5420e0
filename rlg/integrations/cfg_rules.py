"""Pipelines whose classifier-free guidance (CFG) is not linear.

If CFG is linear in the denoiser's outputs, then guidance of each output is guidance of the two whole updates. A rule
that rescales or projects is applied to the guided outputs instead, which is another function. w = 0 and w = 1 are
still base and tuned model. Names and defaults are those of diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

_BY_DEFAULT = (  # prefixes of pipelines' names
    "AceStep",  # it projects the difference, and limits its norm
    "HunyuanImagePipeline",  # its guider projects
    "JoyImage",
    "LEditsPP",  # it keeps the largest differences
    "LongCatImage",
    "LTX2Condition",
    "LTX2ImageToVideo",
    "LTX2InContext",
    "LTX2Pipeline",
    "Lumina2",
    "NucleusMoE",
    "QwenImage",
)
_LINEAR_BY_DEFAULT = ("QwenImage21", "QwenImageLayered")
_OPTIONS = ("_guidance_rescale", "_audio_guidance_rescale", "_cfg_normalization")  # pipelines set these in a call
_WHAT = (
    "which is then not linear: the rule is applied to the guided outputs, not to base and tuned model apart "
    "(docs/adapters.md)"
)


def by_default(pipe: Any) -> str | None:
    """A warning for a pipeline whose default rule is not linear."""
    name = type(pipe).__name__
    if not name.startswith(_BY_DEFAULT) or name.startswith(_LINEAR_BY_DEFAULT):
        return None
    return f"{name} rescales or projects its classifier-free guidance, {_WHAT}"


def in_this_call(pipe: Any) -> str | None:
    """A warning if the running call has turned such a rule on.

    It looks at the attributes that the pipeline keeps during a call.
    """
    if getattr(pipe, "do_classifier_free_guidance", True) is False or by_default(pipe):
        return None
    on = next((option for option in _OPTIONS if getattr(pipe, option, None)), None)
    return f"{on.strip('_')} rescales the classifier-free guidance of this call, {_WHAT}" if on else None
