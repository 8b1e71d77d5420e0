"""Trainers from Python: one signature, inputs given or by name, and one process that trains more than once."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from rewards import RewardMix
from rlg.models.policy import Policy
from rlg.prompts import Prompt
from tests.support.documented import python_blocks
from tests.support.paths import ROOT
from tests.support.smooth_rewards import brightness
from trainers.adjoint_matching import AdjointMatchingTrainer
from trainers.data import preference_pairs
from trainers.dpo import DPOConfig, DPOTrainer, OnlineDPOTrainer, trainer_of
from trainers.draft import DRaFTTrainer
from trainers.grpo import GRPOConfig, GRPOTrainer
from trainers.nft import NFTTrainer
from trainers.rwr import RWRTrainer
from trainers.spm import SPMConfig, SPMTrainer
from trainers.spo import SPOTrainer
from trainers.vgg_flow import VGGFlowTrainer

TRAINERS = (
    AdjointMatchingTrainer,
    DRaFTTrainer,
    GRPOTrainer,
    NFTTrainer,
    RWRTrainer,
    SPOTrainer,
    DPOTrainer,
    OnlineDPOTrainer,
    SPMTrainer,
    VGGFlowTrainer,
)
ORDER = ("config", "policy", "reward", "prompts", "data", "held_out", "eval_prompts", "accelerator")
TEXTS = ["a red circle", "two blue crosses"]
LORA = {"dtype": "float32", "lora_rank": 2, "lora_alpha": 4, "learning_rate": 1e-2, "steps": 3}
LORA |= {"cfg": 1.0, "ema_decay": 0.0, "sample_steps": 0}
GROUPS = {"num_prompts": 2, "num_generations": 2, "batch_size": 4}
Make = Callable[..., GRPOConfig]


def redness(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A reward of the user's own."""
    return images[:, 0].mean(dim=(1, 2))


@pytest.fixture
def config(tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A GRPO config that names neither reward nor prompts; sys.argv is not read."""
    monkeypatch.setattr(sys, "argv", ["notebook", "--nonsense"])
    place = {"base": str(tiny_folder("sd3")), "name": "run", "output_dir": str(tmp_path)}
    return lambda **options: GRPOConfig(**place | LORA | GROUPS | {"max_steps": 1} | options)


def losses(folder: Path) -> list[tuple[float, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_all_constructors_take_the_same_arguments_in_one_order() -> None:
    for trainer in TRAINERS:
        first, *rest = list(inspect.signature(trainer).parameters.values())
        names = [first.name, *(each.name for each in rest)]
        assert names == [name for name in ORDER if name in names], trainer
        assert {"config", "policy", "accelerator"} <= set(names), trainer
        assert ("prompts" in names) != ("data" in names), trainer
        assert all(each.kind is each.KEYWORD_ONLY and each.default is None for each in rest), trainer


@pytest.mark.numerics
def test_one_process_trains_in_one_precision_after_the_other(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training in float32 is the same before one in bfloat16, and after it, also if both were made before."""

    def make(name: str, **precision: str) -> GRPOTrainer:
        return GRPOTrainer(config(name=name, max_steps=2, **precision), reward=redness, prompts=TEXTS)

    monkeypatch.setattr(Accelerator, "end_training", None)  # it takes the process group down, which the next one needs
    make("first").train()
    half = make("half", mixed_precision="bf16", dtype="bfloat16")
    last = make("last")
    seen: dict[str, Any] = {}
    for name, trainer in (("half", half), ("last", last)):
        with trainer.accelerator.autocast():
            seen[name] = torch.is_autocast_enabled("cpu"), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert seen == {"half": (True, torch.bfloat16), "last": (False, torch.float32)}
    half.train()
    last.train()
    assert losses(tmp_path / "first") == losses(tmp_path / "last") != losses(tmp_path / "half")
    assert (half.accelerator.mixed_precision, last.accelerator.mixed_precision) == ("bf16", "no")
    assert half.policy.pipe.vae.dtype == torch.bfloat16 and last.policy.pipe.vae.dtype == torch.float32


def test_a_policy_is_trained_on_in_another_precision(config: Make, tiny_policy: Callable[..., Policy]) -> None:
    """An earlier training's autocast does not stay around the network."""
    policy = tiny_policy("sd3")
    before = [parameter.detach().clone() for parameter in policy.trainable()]
    give = {"policy": policy, "reward": redness, "prompts": TEXTS}
    GRPOTrainer(config(name="half", mixed_precision="bf16"), **give).train()
    middle = [parameter.detach().clone() for parameter in policy.trainable()]
    trainer = GRPOTrainer(config(name="whole", base="nowhere/at-all", dtype="bfloat16"), **give)
    assert (trainer.config.base, trainer.config.dtype) == (policy.base, "float32")  # the policy's own
    x, t_B = torch.randn(1, *trainer.shape), torch.full((1,), 500.0)
    states: list[bool] = []
    inner = next(module for module in policy.network.modules() if isinstance(module, torch.nn.Linear))
    hook = inner.register_forward_hook(lambda *_: states.append(torch.is_autocast_enabled("cpu")))
    policy.predict(x, t_B, trainer.negative)
    hook.remove()
    assert states and not any(states)
    trainer.train()
    rows = zip(before, middle, policy.trainable(), strict=True)
    assert all(not torch.equal(a, b) and not torch.equal(b, c) for a, b, c in rows)


def test_a_policy_without_a_lora_gets_the_configs(config: Make, tiny_folder: Callable[[str], Path]) -> None:
    policy = Policy.load(str(tiny_folder("sd3")))
    trainer = GRPOTrainer(config(lora_rank=3), policy=policy, reward=redness, prompts=TEXTS)
    assert trainer.policy is policy and 3 in policy.trainable()[0].shape
    own = GRPOTrainer(config(name="own", lora_rank=3), reward=redness, prompts=TEXTS)
    pairs = zip(policy.trainable(), own.policy.trainable(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # the seed's
    policy.tuned = torch.nn.Identity()
    with pytest.raises(ValueError, match="tuned model is a full network"):
        GRPOTrainer(config(name="full"), policy=policy, reward=redness, prompts=TEXTS)


def test_config_yaml_names_what_is_given(config: Make, tmp_path: Path) -> None:
    mix = RewardMix({"bright": brightness, "red": redness}, (0.5, 1.0))
    checkpoint = GRPOTrainer(config(), reward=mix, prompts=[Prompt(TEXTS[0], {"a": 1}), TEXTS[1]]).train()
    assert checkpoint == tmp_path / "run" / "checkpoint-1" and (checkpoint / "adapter").is_dir()
    row = yaml.safe_load((checkpoint / "config.yaml").read_text())
    assert (row["reward"], row["reward_weights"], row["prompts"]) == (["bright", "red"], [0.5, 1.0], None)
    assert {"reward/bright", "reward/red"} <= json.loads((tmp_path / "run" / "metrics.jsonl").read_text()).keys()


@pytest.mark.parametrize(
    ("named", "given", "recorded"),
    [
        ({}, redness, (["redness"], None)),
        ({}, lambda images, prompts, metadata: redness(images, prompts, metadata), (["reward"], None)),
        ({}, "jpeg_compressibility", (["jpeg_compressibility"], None)),
        ({"reward": ["gravity"]}, ["jpeg_compressibility"], (["jpeg_compressibility"], None)),
        ({"reward": ["gravity"], "reward_weights": [2.0]}, redness, (["redness"], None)),
        ({"reward": ["red=a/b"]}, RewardMix({"red": redness}, (1.0,)), (["red=a/b"], None)),
        ({"reward": ["red"], "reward_weights": [1.0]}, RewardMix({"red": redness}, (1.0,)), (["red"], [1.0])),
        ({"reward": ["red"]}, RewardMix({"red": redness}, (3.0,)), (["red"], [3.0])),
        ({"reward": ["jpeg_compressibility"], "reward_weights": [2.0]}, None, (["jpeg_compressibility"], [2.0])),
    ],
)
def test_rewards_are_given_or_named(named: dict, given: Any, recorded: tuple, config: Make) -> None:
    trainer = GRPOTrainer(config(**named), reward=given, prompts=TEXTS, held_out=redness, eval_prompts=TEXTS[:1])
    assert (trainer.config.reward, trainer.config.reward_weights) == recorded
    names, weights = recorded
    assert trainer.reward.names == tuple(name.partition("=")[0] for name in names)
    assert trainer.reward.weights == tuple(weights or (1.0,)) and trainer.reward.lenient
    assert trainer.config.held_out_reward == ["redness"] and trainer.held_out.names == ("redness",)
    assert [prompt.text for prompt in trainer.eval_prompts] == TEXTS[:1]


def test_prompts_are_given_or_named(config: Make) -> None:
    one = GRPOTrainer(config(prompts="no/file.txt"), reward=redness, prompts="tinyworld:composition/train")
    assert one.config.prompts == "tinyworld:composition/train" and len(one.prompts) > 100
    assert one.prompts[0].metadata
    other = GRPOTrainer(config(prompts="tinyworld:composition/test"), reward="jpeg_compressibility")
    assert other.prompts != one.prompts and other.config.prompts == "tinyworld:composition/test"
    evaluated = config(eval_steps=1, eval_prompts="tinyworld:composition/test", prompts="tinyworld:composition/train")
    texts = GRPOTrainer(evaluated, reward=redness, prompts=TEXTS, eval_prompts=TEXTS)
    assert texts.evaluate().keys() == {"eval/redness"}
    assert (texts.config.prompts, texts.config.eval_prompts) == (None, None)  # it is not trained on those


def test_what_is_missing_or_does_not_fit_is_told_before_a_model_is_loaded(config: Make, tmp_path: Path) -> None:
    nowhere = partial(config, base="nowhere/at-all")
    with pytest.raises(ValueError, match=r"^there is nothing to train on without reward and prompts"):
        GRPOTrainer(nowhere())
    with pytest.raises(ValueError, match="eval_steps = 1 needs eval_prompts"):
        GRPOTrainer(nowhere(eval_steps=1), reward=redness, prompts=TEXTS)
    with pytest.raises(ValueError, match="nothing to train on without reward and prompts"):
        GRPOTrainer(nowhere(reward=["gravity"]), reward=[], prompts=[])
    with pytest.raises(ValueError, match="num_prompts = 2, but what is given holds 1 prompts"):
        GRPOTrainer(nowhere(), reward=redness, prompts=TEXTS[:1])
    with pytest.raises(ValueError, match="reward 'composition' cannot score 2 of the 2 prompts"):
        GRPOTrainer(nowhere(), reward="composition", prompts=TEXTS)
    with pytest.raises(ValueError, match="dry_run is of the command line"):
        GRPOTrainer(nowhere(dry_run=True), reward=redness, prompts=TEXTS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="exists; give --resume, --overwrite or another --name"):
        GRPOTrainer(nowhere(), reward=redness, prompts=TEXTS)

    def gravity(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return redness(images, prompts, metadata)

    with pytest.raises(ValueError, match=r"the function gravity has the name of another reward .* rename it"):
        GRPOTrainer(nowhere(), reward=gravity, prompts=TEXTS)


def test_a_run_goes_on(config: Make, tmp_path: Path) -> None:
    """As an uninterrupted one; with other prompts or another reward it is another run."""
    GRPOTrainer(config(name="whole", max_steps=3), reward=redness, prompts=TEXTS).train()
    GRPOTrainer(config(max_steps=2), reward=redness, prompts=TEXTS).train()
    longer = config(max_steps=3, resume=True)
    with pytest.raises(ValueError, match=r"reward = \['brightness'\], and not \['redness'\]"):
        GRPOTrainer(longer, reward=brightness, prompts=TEXTS).train()
    with pytest.raises(ValueError, match="prompts"):
        GRPOTrainer(longer, reward=redness, prompts=[*TEXTS, "a dog"]).train()
    assert GRPOTrainer(longer, reward=redness, prompts=TEXTS).train().name == "checkpoint-3"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_accelerator_of_the_callers_is_used(config: Make, tmp_path: Path) -> None:
    engine = Accelerator(cpu=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    trainer = GRPOTrainer(config(), reward=redness, prompts=TEXTS, accelerator=engine)
    assert trainer.accelerator is engine
    with pytest.raises(ValueError, match="exists; give --resume"):
        trainer.train()


def test_preference_trainers_take_pairs_or_their_name(config: Make, pairs_folder: Path, tmp_path: Path) -> None:
    place = {name: getattr(config(), name) for name in ("base", "output_dir")}
    dpo = partial(DPOConfig, **place, **LORA, batch_size=4, max_steps=1, beta=20.0)
    pairs = preference_pairs.load(str(pairs_folder), "train")
    named = DPOTrainer(dpo(name="named"), data=str(pairs_folder))
    assert named.config.data == str(pairs_folder)
    given = DPOTrainer(dpo(name="given"), data=pairs, reward=redness, eval_prompts=TEXTS)
    assert given.batches.data is pairs and given.config.data is None
    assert named.train().name == given.train().name == "checkpoint-1"
    assert losses(tmp_path / "named") == losses(tmp_path / "given")
    row = yaml.safe_load((tmp_path / "given" / "config.yaml").read_text())
    assert (row["data"], row["reward"], row["online"]) == (None, ["redness"], False)
    assert "num_prompts" not in row and "prompts" not in row  # these are of online DPO
    with pytest.raises(ValueError, match="nothing to train on without data"):
        DPOTrainer(dpo(name="none"))
    with pytest.raises(ValueError, match="test_split test is a split of data: name data"):
        DPOTrainer(dpo(name="none", test_split="test", eval_steps=1), data=pairs, eval_prompts=TEXTS)
    spm = SPMConfig(
        **place, name="spm", clip="tiny", test_split=None, dtype="float32", max_steps=1, accumulation_steps=1
    )
    checkpoint = SPMTrainer(spm, data=pairs).train()
    assert (checkpoint / "step_aware").is_dir() and not (tmp_path / "spm" / "accuracy.json").exists()


def test_dpo_is_online_by_its_config(config: Make) -> None:
    place = {name: getattr(config(), name) for name in ("base", "output_dir")}
    online = DPOConfig(**place, **LORA, **GROUPS, name="online", max_steps=1, online=True)
    with pytest.raises(ValueError, match="online is on: OnlineDPOTrainer"):
        DPOTrainer(online, data="somewhere")
    with pytest.raises(ValueError, match="online is off: DPOTrainer"):
        OnlineDPOTrainer(replace(online, online=False, num_prompts=48, num_generations=24, data="d"), prompts=TEXTS)
    assert trainer_of(online) is OnlineDPOTrainer and trainer_of(DPOConfig(**place, name="n")) is DPOTrainer
    checkpoint = OnlineDPOTrainer(online, reward=redness, prompts=TEXTS).train()
    row = yaml.safe_load((checkpoint / "config.yaml").read_text())
    assert row["online"] is True and row["num_prompts"] == 2 and "data_split" not in row


def test_what_docs_say_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = python_blocks(ROOT / "docs" / "training.md")
    space: dict[str, Any] = {}
    exec(first, space)
    assert space["checkpoint"] == Path("runs/red/checkpoint-2") and space["checkpoint"].is_dir()
    exec(second, space)
    assert space["checkpoint"] == Path("runs/red/checkpoint-3")
