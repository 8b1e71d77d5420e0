"""The table of methods that an evaluation compares.

It has their names in files, their labels and their looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RLG, LORA_SCALE, TWICE, CORRECTED, RLG_LS = "rlg", "lora_scale", "tuned_2x_steps", "corrected", "rlg_ls"
BLEND, BLEND_LS, SOUP, EXPERT, MORL = "blend", "blend_ls", "soup", "expert", "morl"


@dataclass(frozen=True)
class Mark:
    """The look of a method's points, in matplotlib's terms."""

    place: int | None  # place in the palette; None is the colour of text
    marker: str
    line: str | tuple[float, tuple[float, ...]]  # "none" draws points without a line
    order: float  # zorder: larger is on top
    hollow: bool = False


@dataclass(frozen=True)
class Method:
    """One method of an evaluation."""

    name: str  # name in scores.jsonl and summary.json
    label: str  # name in figures and tables
    mark: Mark
    ends: str | None = None  # method whose points at w = 0 and 1 are also the ends of this one's line
    against: str | None = None  # method that its front is compared with
    is_blend: bool = False  # a curve over lambda, which is the share of the second expert
    rule: str = ""  # "module:function", (base, tuned, w) -> Guided: a rule of guidance for all w except 0 and 1


_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 1.5))
METHODS = {
    method.name: method
    for method in (
        Method(RLG, "guided (RLG)", Mark(0, "o", "-", 3.2)),
        Method(LORA_SCALE, "LoRA × w", Mark(1, "s", _DASHED, 3.0, hollow=True), ends=RLG),
        Method(TWICE, "tuned, 2× steps", Mark(2, "D", "none", 3.1)),
        Method(RLG_LS, "base or tuned at random", Mark(3, "^", _DOTTED, 3.0, hollow=True)),
        Method(CORRECTED, "guided, corrected", Mark(4, "v", _DOTTED, 3.15), ends=RLG),
        Method(BLEND, "blend (DB-MPA)", Mark(0, "o", "-", 3.2), ends=EXPERT, is_blend=True),
        Method(
            BLEND_LS,
            "one expert a step (DB-MPA-LS)",
            Mark(3, "^", _DOTTED, 3.1, hollow=True),
            ends=EXPERT,
            against=BLEND,
            is_blend=True,
        ),
        Method(
            SOUP,
            "weights averaged (soup)",
            Mark(1, "s", _DASHED, 3.0, hollow=True),
            ends=EXPERT,
            against=BLEND,
            is_blend=True,
        ),
        Method(EXPERT, "expert alone", Mark(None, "*", "none", 3.4)),
        Method(MORL, "trained on a mix (MORL)", Mark(2, "D", "none", 3.3)),
    )
}
SWEEP_METHODS = RLG, LORA_SCALE, TWICE, CORRECTED  # RLG_LS and rules must be named
BLEND_METHODS = tuple(name for name, method in METHODS.items() if method.is_blend)


def method_of(record: Mapping[str, Any]) -> Any:
    """The method of a row of scores.jsonl or a summary's point.

    Format 1 calls it `mode`. Raises KeyError for a record without either.
    """
    return record["method"] if "method" in record else record["mode"]


def rules() -> tuple[str, ...]:
    """Methods with their own rule of guidance."""
    return tuple(name for name, method in METHODS.items() if method.rule)


def of_sweeps() -> tuple[str, ...]:
    """Methods of a sweep over w."""
    return (*SWEEP_METHODS, RLG_LS, *rules())
