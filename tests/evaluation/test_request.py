"""The evaluation that a command line asks for, as one frozen record; what is begun from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from rlg import evaluate
from rlg.evaluation.blend import BlendSettings
from rlg.evaluation.choose_w import Choice, Goal
from rlg.evaluation.evaluator import Evaluator
from rlg.evaluation.naming import names_of
from rlg.evaluation.options import parse
from tests.support.paths import ROOT

SMALL = ["--num_prompts", "4", "--k", "1", "--steps", "2", "--cfg", "1", "--reward", "jpeg_compressibility"]


def test_a_request_holds_what_the_command_line_says(
    tiny_checkpoint: Callable[[str], Path], tiny_folder: Callable[[str], Path]
) -> None:
    ckpt = tiny_checkpoint("sd3")
    held_out = ["--held_out_reward", "jpeg_incompressibility", "jpeg_compressibility"]
    request = parse(["--ckpt", str(ckpt), *SMALL, *held_out, "--w", "2", "0.5", "2", "--kernel", "sde"])
    (model,) = request.models
    assert (model.path, model.is_network, request.morl) == (str(ckpt), False, ())
    assert (request.base, request.base_is_given) == (str(tiny_folder("sd3")), False)
    assert (request.settings.scales, request.settings.steps, request.settings.sampler) == ((0.5, 2.0), 2, "sde")
    assert (request.settings.level, request.settings.cfg) == (0.7, 1.0)  # the first is the default of --level
    assert (request.prompts, request.num_prompts) == ("tinyworld:composition/test", 4)
    assert request.trained_rewards == ("jpeg_compressibility",)
    assert request.rewards == ("jpeg_compressibility", "jpeg_incompressibility")  # each once
    assert (request.goal, request.output, request.project, request.overwrite) == (None, None, None, False)
    folder, naming = names_of(request)
    assert folder == ckpt.parent / "eval" / "sd3-sde2-cfg1-seed0"
    assert naming == {"name": ckpt.parent.name, "adapter": str(ckpt)}
    with pytest.raises(FrozenInstanceError):
        request.prompts = "others.txt"
    with pytest.raises(AttributeError):
        _ = request.prompt_set  # another name is an error


def test_a_blend_is_a_request_of_two_models(tiny_checkpoint: Callable[[str], Path]) -> None:
    ckpt = str(tiny_checkpoint("sd3"))
    rewards = ["--reward", "jpeg_compressibility", "jpeg_incompressibility=x"]
    request = parse(["--ckpt", ckpt, "--ckpt", ckpt, "--morl", ckpt, "--blend", "0:1:0.5", *SMALL[:-2], *rewards])
    assert isinstance(request.settings, BlendSettings) and request.settings.scales == (0.0, 0.5, 1.0)
    first, second = request.models
    assert first is second is request.morl[0]
    assert names_of(request)[1]["morl"] == [ckpt]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_prompts", "0"], "--num_prompts must be at least 1, got 0"),
        (["--log_adapter"], "--log_adapter keeps the adapter as an artifact of W&B; add --report_to wandb"),
        (["--kl_budget", "-1"], "--kl_budget must be positive, got -1"),
        (["--ckpt", "nowhere", "--blend", "0:1:0.5"], "no such checkpoint: nowhere"),
        (["--w", "nan"], "w must be finite, got nan"),
    ],
)
def test_what_makes_no_evaluation_is_refused_at_the_door(
    options: list[str], message: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(["--ckpt", str(tiny_checkpoint("sd3")), *options])


def test_w_is_chosen_without_changing_what_was_asked(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, few = tmp_path / "out", ["--min_ess", "0.5", "--calibration_prompts", "1"]
    request = parse(["--ckpt", str(tiny_checkpoint("sd3")), *SMALL, *few, "--w", "1", "--output", str(out)])
    loaded = evaluate.load(request)
    tried = []

    def choose_w(goal: Goal, evaluator: Evaluator, *_: Any) -> Choice:
        tried.append(evaluator)
        return Choice(2.5, 0.5, 32)

    monkeypatch.setattr(evaluate, "choose_w", choose_w)
    evaluation = evaluate.begin(request, loaded)
    assert [evaluator.settings for evaluator in tried] == [request.settings]
    assert evaluation.evaluator.settings.scales == (0.0, 1.0, 2.5)
    assert request.settings.scales == (1.0,) and request.goal == Goal("min_ess", 0.5)
    chosen = {"option": "min_ess", "value": 0.5, "calibration_prompts": 1, "w": 2.5, "share": 0.5, "images": 32}
    assert evaluation.meta["chosen"] == chosen
    assert len(evaluation.ids) == 3 and not out.exists()  # one of the 4 prompts is not reported


def test_one_builder_makes_all_parsers() -> None:
    files = [file for package in ("rlg", "rewards", "trainers") for file in (ROOT / package).rglob("*.py")]
    assert {file.name for file in files if "import argparse" in file.read_text()} == {"cli.py", "config_parser.py"}
