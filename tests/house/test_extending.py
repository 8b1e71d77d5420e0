"""The project extended from outside, by the code of docs/extending.md, and nothing else touched."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import rlg
import trainers
from rewards import REWARDS, RewardMix, RewardSpec, build
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.sampling import SampleId, SampleNoise, sample
from rlg.evaluation.evaluator import EvalSettings, Evaluator
from rlg.evaluation.folder import Job
from rlg.evaluation.methods import METHODS, RLG, Mark, Method
from rlg.guidance import guided
from rlg.models.backbones import BACKBONES, pipeline_cfg
from rlg.models.policy import Policy
from rlg.publishing import model_card
from tests.conftest import ONLINE, PROMPTS, check_contract
from tests.support.commands import options, run
from tests.support.documented import EXTENDING, module, python_blocks
from tests.support.golden import read_lines
from tests.support.other_families import OTHERS
from tests.support.paths import ROOT
from tests.support.smooth_rewards import brightness
from tests.support.tiny_families import FAMILIES
from trainers import commands

TEXTS = [prompt.text for prompt in PROMPTS]

# --- a model family -----------------------------------------------------------------------------------------------


@pytest.fixture(params=OTHERS)
def new_family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family that the project does not have: its record, its line in the dictionary, a tiny random pipeline."""
    pipeline, backbone, tiny = OTHERS[request.param]
    monkeypatch.setitem(BACKBONES, pipeline, backbone)
    monkeypatch.setitem(FAMILIES, request.param, tiny)
    return request.param


@pytest.mark.parametrize("algorithm", ONLINE)
def test_a_family_is_trained(new_family: str, tiny_online: Callable[..., Any], algorithm: str) -> None:
    own = {"divert_start_step": 0, "threshold": 0.0} if algorithm == "spo" else {}
    trainer = tiny_online(algorithm, new_family, **own)
    before = [parameter.detach().clone() for parameter in trainer.policy.trainable()]
    trainer.iteration()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.trainable(), strict=True))


def test_a_family_is_trained_resumed_and_evaluated_by_commands(
    new_family: str,
    tiny_folder: Callable[[str], Path],
    pairs_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    training = options(
        base=tiny_folder(new_family),
        output_dir=tmp_path,
        name="run",
        data=pairs_folder,
        dtype="float32",
        batch_size=4,
        lora_rank=2,
        lora_alpha=4,
        cfg=1.0,
        gradient_checkpointing=True,
    )
    with pytest.raises(SystemExit) as ended:
        run("train_dpo", [*training, "--dry_run"])
    assert ended.value.code == 0
    assert "# activations: " in capsys.readouterr().out
    run("train_dpo", [*training, *options(max_steps=1)])
    run("train_dpo", [*training, *options(max_steps=2), "--resume"])
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    checkpoint = tmp_path / "run" / "checkpoint-2"
    by_diffusers = hasattr(getattr(diffusers, OTHERS[new_family][0]), "load_lora_weights")
    assert ("pipe.load_lora_weights" in (checkpoint / "README.md").read_text()) == by_diffusers
    assert len(model_card.files(checkpoint)) == 3 + by_diffusers  # the adapter in one or two formats, and the card
    prompts = {"prompts": "tinyworld:composition/test", "num_prompts": 2, "k": 1, "steps": 2, "cfg": 1.0}
    run("rlg.evaluate", ["--ckpt", checkpoint, *options(reward="colourfulness", w=[0, 1, 2], **prompts)])
    (rows,) = tmp_path.glob("run/eval/*/scores.jsonl")
    assert {row["w"] for row in read_lines(rows)} == {0.0, 1.0, 2.0}


def test_a_family_is_guided_in_its_own_pipeline(
    new_family: str, tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """`rlg.apply` with CFG makes what our sampler makes; and an evaluation's images go by w."""
    policy = Policy.load(str(tiny_folder(new_family)))
    policy.load_adapter(tiny_checkpoint(new_family))
    noise = SampleNoise([SampleId(7, i, 0) for i in range(len(PROMPTS))], policy.latent_shape())
    base, tuned = (guided.with_cfg(model, policy.encode([""]), 4.0) for model in (policy.reference, policy.predict))
    ours = sample(guided.rlg(base, tuned, 2.0), policy.schedule(3, "ode", 0.0), policy.encode(TEXTS), noise)
    pipe, tiny = diffusers.DiffusionPipeline.from_pretrained(tiny_folder(new_family)), FAMILIES[new_family]
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    with rlg.apply(pipe, tiny_checkpoint(new_family), 2.0):
        how = {**size, **pipeline_cfg(pipe, 4.0), **tiny.options}
        theirs = pipe(TEXTS, latents=tiny.pack(noise.initial()), **how).images
    torch.testing.assert_close(tiny.pack(ours), theirs, rtol=1e-4, atol=1e-4)

    settings = EvalSettings((0.0, 1.0, 2.0), ("rlg", "lora_scale"), 2, "sde", 0.7, 1.0, None, 1, seed=0, batch_size=4)
    evaluator = Evaluator(policy, RewardMix({"brightness": brightness}, (1.0,)), PROMPTS, settings)
    rows = {w: evaluator.rows_at([0, 1], w, 1) for w in settings.scales}
    assert len({row.rewards["brightness"] for found in rows.values() for row in found}) == 6
    assert [row.kl for row in rows[0.0]] == [0.0, 0.0] and rows[1.0][0].kl > 0


def test_every_family_has_a_tiny_pipeline() -> None:
    assert {type(family.build()).__name__ for family in FAMILIES.values()} == BACKBONES.keys()


# --- a reward -----------------------------------------------------------------------------------------------------


def test_a_reward_is_a_file_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module("rewards/redness.py")
    ((name, line),) = re.findall(r'`"(\w+)":\s+(RewardSpec\([^`]*\)),`', EXTENDING.read_text())
    monkeypatch.setitem(REWARDS, name, eval(line, {"RewardSpec": RewardSpec}))
    images_B3HW = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])[:, :, None, None].expand(-1, -1, 8, 8)
    scores_B = check_contract(build([name]).rewards[name], images_B3HW, TEXTS[:2], [{}, {}])
    assert scores_B.tolist() == [1.0, -1.0]


# --- a trainer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def reinforce(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The command of a trainer whose two files lie in trainers/, as it were."""
    folder = ROOT / "tests/support/new_trainer"
    monkeypatch.setattr(trainers, "__path__", [*trainers.__path__, str(folder)])
    found = commands.commands(folder)
    assert found.keys() - commands.TRAINERS.keys() == {"reinforce"}
    return found["reinforce"]


def test_a_trainer_is_two_files_and_a_script(
    reinforce: Callable[[], None],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Its command trains and goes on, and its checkpoint is evaluated as any other."""
    training = options(
        base=tiny_folder("sd3"),
        output_dir=tmp_path,
        name="run",
        reward="colourfulness",
        prompts="tinyworld:composition/train",
        dtype="float32",
        num_prompts=2,
        num_generations=2,
        steps=3,
        batch_size=4,
        cfg=1.0,
        learning_rate=1e-2,
        sample_steps=0,
        level=0.5,
    )
    for more in (["--max_steps", "1"], ["--max_steps", "2", "--resume"]):
        monkeypatch.setattr(sys, "argv", ["train_reinforce.py", *training, *more])
        reinforce()
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    prompts = {"prompts": "tinyworld:composition/test", "num_prompts": 2, "k": 1, "steps": 2}
    run("rlg.evaluate", ["--ckpt", tmp_path / "run" / "checkpoint-2", *options(w=[0, 2], **prompts)])
    assert len(list(tmp_path.glob("run/eval/*/summary.json"))) == 1
    monkeypatch.setattr(sys, "argv", ["train_reinforce.py", *training, "--level", "0"])
    with pytest.raises(ValueError, match="level"):
        reinforce()


def test_the_trainer_of_the_page_trains_and_goes_on(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its best sample of each group has the group's weight: by hand, and as a command."""
    for path in ("trainers/raft_config.py", "trainers/raft.py"):
        module(path)
    weight_B = module("trainers/raft.py").best_of_group(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1]))
    assert weight_B.tolist() == [0.0, 2.0, 1.0]
    training = options(
        base=tiny_folder("sd3"),
        output_dir=tmp_path,
        name="run",
        reward="colourfulness",
        prompts="tinyworld:composition/train",
        dtype="float32",
        num_prompts=2,
        num_generations=2,
        steps=2,
        batch_size=4,
        sample_steps=0,
    )
    for more in (["--max_steps", "1"], ["--max_steps", "2", "--resume"]):
        monkeypatch.setattr(sys, "argv", ["train_raft.py", *training, *more])
        commands.train("raft")
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_trainer_steps_along_the_score(reinforce: Callable[[], None], tiny_online: Callable[..., Any]) -> None:
    """By hand, - (0.5 * -1 - 0.5 * -3) / 2; and the images of a better reward become likelier."""
    module, config = (importlib.import_module(f"trainers.reinforce{end}") for end in ("", "_config"))
    loss, _ = module.reinforce_loss(torch.tensor([-1.0, -3.0]), torch.tensor([0.5, -0.5]))
    assert float(loss) == pytest.approx(-0.5)
    trainer = tiny_online((config.ReinforceConfig, module.ReinforceTrainer), learning_rate=1e-3)
    samples = trainer.rollout()
    advantage_B, _ = trainer.score(samples)
    first, _ = (trainer.update(samples, advantage_B)["loss"] for _ in range(2))
    assert trainer.update(samples, advantage_B)["loss"] < first


# --- a rule of guidance -------------------------------------------------------------------------------------------


def test_a_rule_is_a_file_and_a_row(tiny_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run at each w but 0 and 1, beside RLG, with passes and a path KL of its own."""
    rule = f"{module('rlg/guidance/rescaled.py').__name__}:rescaled"
    row = Method("rescaled", "guided, rescaled", Mark(5, "P", "-", 3.1), ends=RLG, rule=rule)
    monkeypatch.setitem(METHODS, "rescaled", row)
    settings = EvalSettings((0.0, 1.0, 3.0), (RLG, "rescaled"), 2, "sde", 0.7, 1.0, None, 1, seed=0, batch_size=4)
    assert ("rescaled", (3.0,)) in list(settings.sweeps())
    judge = Evaluator(tiny_policy("sd3"), RewardMix({"brightness": brightness}, (1.0,)), PROMPTS, settings)
    plain, ours = (judge.generate([Job(0, 0, 3.0, mode)]) for mode in (RLG, "rescaled"))
    assert ours.nfe_B.tolist() == plain.nfe_B.tolist() == [4]
    assert not torch.equal(ours.pixels_B3HW, plain.pixels_B3HW)
    assert float(ours.kl_B) > 0 and float(ours.kl_B) != float(plain.kl_B)
    assert plain.log_weight_B is not None and ours.log_weight_B is None  # it has none that anyone knows


def test_a_rule_keeps_the_spread_of_the_tuned_model() -> None:
    """Base (1, -1), tuned (2, 0), w = 3: guided is (4, 2), as wide as tuned, and stays; at base (3, -3) it shrinks."""

    def constant(first: float, second: float) -> Any:
        return lambda x, t, cond: torch.tensor([[[[first, second]]]])

    x, cond = torch.zeros(1, 1, 1, 2), Conditioning({})
    for base, expected in (((1.0, -1.0), (4.0, 2.0)), ((-1.0, 1.0), None)):
        rule = module("rlg/guidance/rescaled.py").rescaled(constant(*base), constant(2.0, 0.0), 3.0)
        out = rule(x, torch.ones(1), cond)
        assert float(out.std()) == pytest.approx(math.sqrt(2))  # of (2, 0)
        assert expected is None or out.flatten().tolist() == pytest.approx(expected)


# --- the page -----------------------------------------------------------------------------------------------------


def test_every_block_of_the_page_is_short_and_is_run_here() -> None:
    """At most 25 lines of code each: what the tests above do not name would fail to be found."""
    here = Path(__file__).read_text() + (ROOT / "tests/support/other_families.py").read_text()
    for code in python_blocks(EXTENDING):
        path = code.partition("\n")[0].removeprefix("# ")
        assert f'"{path}"' in here or f"'{path}'" in here, path
        assert len([line for line in code.splitlines()[1:] if line.strip()]) <= 25, path
