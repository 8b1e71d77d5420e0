"""The table of methods: names that files hold, and looks that tell them apart."""

from __future__ import annotations

from itertools import combinations

from rlg.evaluation.methods import BLEND_METHODS, METHODS, SWEEP_METHODS
from rlg.reports.theme import COLOURS, MARKS, PALETTE


def test_names_are_those_of_the_files() -> None:
    """A renamed method would make older evaluations unreadable."""
    assert SWEEP_METHODS == ("rlg", "lora_scale", "tuned_2x_steps", "corrected")
    assert BLEND_METHODS == ("blend", "blend_ls", "soup")
    assert {*SWEEP_METHODS, "rlg_ls", *BLEND_METHODS, "expert", "morl"} <= {*METHODS}
    assert all(name == method.name for name, method in METHODS.items())


def test_every_method_has_a_look_of_its_own_beside_those_it_is_drawn_with() -> None:
    """The base of a blend is drawn without the method's look, so a blend may share one with a sweep."""
    sweep = [*SWEEP_METHODS, "rlg_ls"]
    for group in (sweep, [name for name in METHODS if name not in sweep]):
        for one, other in combinations(group, 2):
            assert COLOURS[one] != COLOURS[other], (one, other)
            assert MARKS[one]["marker"] != MARKS[other]["marker"], (one, other)
    assert COLOURS["rlg"] == PALETTE[0]
    assert MARKS["soup"] == {"linestyle": (0, (4, 2)), "marker": "s", "zorder": 3.0, "markerfacecolor": "white"}


def test_methods_refer_to_methods() -> None:
    assert all({method.ends, method.against} <= {None, *METHODS} for method in METHODS.values())
