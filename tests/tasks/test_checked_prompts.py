"""Prompts that a reward cannot score are found before an image is made: in training, resumes and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import rewards
from rewards import CheckedReward, RewardMix, build
from rlg import evaluate, preferences
from rlg.app import __main__, generator
from rlg.app.options import COMMAND as APP
from rlg.app.page import answer
from rlg.equivalence import runner
from rlg.equivalence.experiment import COMMAND as EQUIVALENCE
from rlg.evaluation.options import parse
from rlg.prompts import Prompt
from rlg.tasks import prompt_sets
from trainers.core.online import OnlineTrainer

Make = Callable[..., OnlineTrainer]
LINES = ["a sign that says “STOP”", "a sign", 'a 5" nail', 'a sign that says "GO"']
MESSAGE = (
    r"reward 'text' cannot score 2 of the 4 prompts; the first is number 2, 'a sign': no text between double quotes"
)


def text_reward() -> CheckedReward:
    """As the OCR reward, without reading: brightness."""
    from rewards.ocr import target

    def score(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        [target(prompt) for prompt in prompts]
        return images_B3HW.mean(dim=(1, 2, 3))

    return CheckedReward(score, lambda prompt, row: target(prompt), "a model")


MIX = RewardMix({"text": text_reward()}, (1.0,))


def test_a_mix_names_the_reward_the_first_prompt_and_the_count() -> None:
    both = RewardMix({"plain": lambda *_: torch.zeros(1), "text": text_reward()}, (1.0, 1.0))
    with pytest.raises(ValueError, match=MESSAGE):
        both.check(LINES, [{}] * 4)
    both.check(LINES[3:], [{}])
    assert both.unscorable(LINES, [{}] * 4)["text"].keys() == {1, 2}
    assert both.models == {"text": "a model"}


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("composition", {}, "the metadata has no 'include'"),
        ("composition_strict", {"include": [{"class": "dog", "count": 1}]}, "cannot see a 'dog'"),
    ],
)
def test_rewards_that_need_metadata_say_so_beforehand(name: str, metadata: dict[str, Any], message: str) -> None:
    good = prompt_sets.load("tinyworld:composition/test")[0]
    mix = build([name])
    mix.check([good.text], [good.metadata])
    with pytest.raises(ValueError, match=f"{name}' cannot score 1 of the 2 prompts; the first is number 2.*{message}"):
        mix.check([good.text, "a dog"], [good.metadata, metadata])


def test_training_does_not_begin(tiny_online: Make, tmp_path: Path) -> None:
    """Neither a first time nor at a resume, and before a model is loaded."""
    made = tiny_online("grpo", num_prompts=2)
    kind, config = type(made), made.config
    config.base = "nowhere/at-all"
    rows = [Prompt(line) for line in LINES]
    (tmp_path / "run").mkdir()
    for resume in (False, True):
        config.resume = resume
        with pytest.raises(ValueError, match=MESSAGE):
            kind(config, reward=MIX, prompts=rows)
    config.eval_steps, config.eval_num_prompts = 1, 4
    for reward, held_out in ((MIX, None), (RewardMix({"b": lambda *_: torch.zeros(1)}, (1.0,)), MIX)):
        with pytest.raises(ValueError, match=MESSAGE):
            kind(config, reward=reward, prompts=[rows[0], rows[3]], held_out=held_out, eval_prompts=rows)
    config.eval_steps = 0  # never evaluated
    with pytest.raises(ValueError, match="cannot load the base model"):
        kind(config, reward=MIX, prompts=[rows[0], rows[3]], eval_prompts=rows)
    assert not list((tmp_path / "run").iterdir())


def test_an_evaluation_does_not_begin(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES), encoding="utf-8")
    monkeypatch.setattr(rewards, "build", lambda *_, **__: MIX)
    argv = ["--ckpt", str(tiny_checkpoint("sd3")), "--prompts", str(file), "--reward", "text"]
    with pytest.raises(ValueError, match=MESSAGE):
        evaluate.load(parse([*argv, "--base", "nowhere/at-all"]))
    with pytest.raises(ValueError, match="cannot load the base model"):  # those that are used are fine
        evaluate.load(parse([*argv, "--base", "nowhere/at-all", "--num_prompts", "1"]))


def test_pairs_and_oracles_do_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES), encoding="utf-8")
    monkeypatch.setattr(rewards, "build", lambda *_, **__: MIX)
    argv = ["--base", "nowhere/at-all", "--output", str(tmp_path / "pairs"), "--pairs", "2", "--prompts", str(file)]
    with pytest.raises(ValueError, match=MESSAGE):
        preferences.run(preferences.COMMAND.parse(argv))
    experiment = SimpleNamespace(prompts=str(file), prompt_column=None, num_prompts=None)
    with pytest.raises(ValueError, match=MESSAGE):
        runner.measure(experiment, MIX, tmp_path)  # type: ignore[arg-type]


def test_a_column_of_prompts_is_read_everywhere(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs and the oracle find the prompt that their reward cannot judge; the app shows the first of them."""
    monkeypatch.setattr(rewards, "build", lambda *_, **__: MIX)
    file, config = tmp_path / "p.csv", tmp_path / "e.yaml"
    file.write_text("tag,caption\nx,a cat\ny,a dog\n", encoding="utf-8")
    config.write_text(f"base: nowhere/at-all\nreward: text\nckpt: none\nbeta: 1.0\nprompts: {file}\n")
    chosen = ["--prompts", str(file), "--prompt_column", "caption"]
    pairs = ["--base", "nowhere/at-all", "--output", str(tmp_path / "pairs"), "--pairs", "2", *chosen]
    experiment = EQUIVALENCE.parse(["--config", str(config), "--prompt_column", "caption"])
    assert experiment.prompt_column == "caption"
    with pytest.raises(ValueError, match="cannot score 2 of the 2 prompts"):
        preferences.run(preferences.COMMAND.parse(pairs))
    with pytest.raises(ValueError, match="cannot score 2 of the 2 prompts"):
        runner.measure(experiment, MIX, tmp_path)
    with pytest.raises(ValueError, match="a row needs a text under `prompt`; it has tag, caption"):
        runner.measure(EQUIVALENCE.parse(["--config", str(config)]), MIX, tmp_path)
    own, page = __main__.load(APP.parse(["--ckpt", str(tiny_checkpoint("sd")), *chosen]))
    assert own.metadata == {"a cat": {"tag": "x"}, "a dog": {"tag": "y"}}
    assert page.examples == ("a cat", "a dog")
    with pytest.raises(ValueError, match="--prompt_column caption does nothing without a file of prompts"):
        prompt_sets.load_each([None], "caption")


def test_the_app_says_which_reward_cannot_judge_a_prompt() -> None:
    own = generator.ImageGenerator.__new__(generator.ImageGenerator)
    own.reward, own.metadata = MIX, {}
    assert own.unscorable(LINES[0]) == {}
    assert own.unscorable(LINES[1])["text"].startswith("no text between double quotes")
    own.column = lambda *_: generator.Column((Image.new("RGB", (8, 8)),), ({},))  # type: ignore[method-assign]
    page = SimpleNamespace(max_w=4.0)
    for line, said in ((LINES[0], False), (LINES[1], True)):
        strip = answer(own, page, [line, 1.0, "", 1, 2, 1.0, "", "ode", 0], lambda *_, **__: None)  # type: ignore[arg-type]
        assert ("text cannot judge this prompt: no text between double quotes" in strip) == said
    own.reward = None
    assert own.unscorable(LINES[1]) == {}
