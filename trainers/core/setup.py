"""Set-up of a training: accelerator, policy, rewards and prompts.

Each is given, or made by its name in the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import nn

import rewards
from rewards import REWARDS, Reward, RewardMix
from rlg.models.loading import DTYPES
from rlg.models.policy import Policy
from rlg.prompts import Prompt
from rlg.tasks import prompt_sets
from trainers.checkpoints import engines
from trainers.core.config import ConfigT, RunConfig, SamplingConfig, TrainConfig
from trainers.data.preference_formats import Pairs

Rewards = RewardMix | Reward | str | Sequence[str]  # a mix, a function of your own, or names as in `python -m rewards`
Prompts = str | Sequence[str | Prompt]  # a prompt set's name, texts, or records


@dataclass(frozen=True, kw_only=True)
class Given:
    """Inputs that a trainer is given; None where the config names it."""

    policy: Policy | None = None  # a loaded policy; it gets the config's LoRA, unless it has one
    reward: Rewards | None = None
    prompts: Prompts | None = None
    data: str | Path | Pairs | None = None  # preference pairs, or their name
    held_out: Rewards | None = None
    eval_prompts: Prompts | None = None

    @property
    def unnamed(self) -> set[str]:
        """Fields that no config can name: texts, records and loaded pairs."""
        rows = {"prompts": self.prompts, "eval_prompts": self.eval_prompts, "data": self.data}
        return {field for field, value in rows.items() if value and not isinstance(value, (str, Path))}


def named(config: ConfigT, given: Given) -> ConfigT:
    """The config with the names of given inputs, as config.yaml keeps them.

    They are those of the base, rewards, prompts and data. None stands for an input without a name. Raises ValueError
    for a function with the name of another reward.
    """
    names: dict[str, Any] = dict.fromkeys(given.unnamed)
    if given.policy is not None:
        names |= {"base": given.policy.base, "dtype": _dtype_of(given.policy)}
    if isinstance(given.data, (str, Path)):
        names["data"] = str(given.data)
    names |= {name: value for name in ("prompts", "eval_prompts") if isinstance(value := getattr(given, name), str)}
    if isinstance(config, TrainConfig):
        names |= _reward_names(given.reward, config.reward, "reward", config.reward_weights)
        names |= _reward_names(given.held_out, config.held_out_reward, "held_out_reward")
    return replace(config, **names) if any(getattr(config, n) != value for n, value in names.items()) else config


def _dtype_of(policy: Policy) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return next(names[p.dtype] for p in policy.network.parameters() if not p.requires_grad and p.dtype in names)


def _reward_names(
    given: Rewards | None, known: Sequence[str], option: str, weights: Sequence[float] | None = None
) -> dict[str, Any]:
    """Changes of the config by given rewards.

    If a mix has the names of the config's rewards, the config's sources stay.
    """
    if given is None:
        return {}
    mix = _mix(given)
    if mix is None:
        return {option: [given] if isinstance(given, str) else list(given)}
    names = {} if [name.partition("=")[0] for name in known] == list(mix.names) else {option: list(mix.names)}
    if option == "reward" and tuple(weights or (1.0,) * len(mix.names)) != mix.weights:
        names["reward_weights"] = list(mix.weights) if set(mix.weights) != {1.0} else None
    return names


def _mix(given: Rewards | None) -> RewardMix | None:
    """The mix, given or made of a function; None for names."""
    if isinstance(given, RewardMix):
        return given
    if not callable(given):
        return None
    name = getattr(given, "__name__", type(given).__name__)
    name = name if name.isidentifier() else "reward"  # a lambda has no usable name
    if name in REWARDS:
        raise ValueError(f"the function {name} has the name of another reward (python -m rewards); rename it")
    return RewardMix({name: given}, (1.0,))


def load_rewards(config: TrainConfig, given: Given, device: torch.device) -> tuple[RewardMix | None, RewardMix | None]:
    """(rewards to train on, held-out ones); None where there are none.

    Raises ValueError as `rewards.build`.
    """
    reward, held_out = _mix(given.reward), _mix(given.held_out)
    if reward is None and config.reward:
        reward = rewards.build(config.reward, config.reward_weights, device=device)
    if held_out is None and config.held_out_reward:
        held_out = rewards.build(config.held_out_reward, device=device)
    how = {"lenient": True, "seconds": config.reward_seconds}
    return reward and replace(reward, **how), held_out and replace(held_out, **how)


def load_prompts(config: TrainConfig, given: Given) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out ones).

    Raises ValueError as `prompt_sets.load_each`.
    """
    training, held_out = _records(given.prompts), _records(given.eval_prompts)
    source = config.prompts if training is None and isinstance(config, SamplingConfig) else None
    found = prompt_sets.load_each([source, config.eval_prompts if held_out is None else None], config.prompt_column)
    return found[0] if training is None else training, found[1] if held_out is None else held_out


def _records(given: Prompts | None) -> list[Prompt] | None:
    """Given prompts as records; None for the name of a set."""
    if given is None or isinstance(given, str):
        return None
    return [each if isinstance(each, Prompt) else Prompt(each) for each in given]


def make_accelerator(config: RunConfig) -> Accelerator:
    """accelerate's engine for this run.

    Raises ValueError for a tracker that is not installed.
    """
    if config.report_to not in ("none", *map(str, get_available_trackers())):  # accelerate would drop it in silence
        raise ValueError(f"report_to is {config.report_to}, which is not installed: pip install {config.report_to}")
    accelerator = engines.make_accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=str(config.folder), logging_dir=str(config.folder / "logs")),
    )
    round_products(config, accelerator)
    return accelerator


def round_products(config: RunConfig, accelerator: Accelerator) -> None:
    """Have a GPU round float32 products as the config says.

    Another training in this process may say otherwise.
    """
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32


def load_policy(config: RunConfig, accelerator: Accelerator, policy: Policy | None = None) -> Policy:
    """The base model, given or by name, on the accelerator's device.

    Raises ValueError as `Policy.load`, and for a policy whose tuned model is a full network.
    """
    if policy is None:
        return Policy.load(
            config.base, config.dtype, accelerator.device, t5_length=config.t5_length, vae_dtype=config.vae_dtype
        )
    if policy.tuned is not None:
        raise ValueError("the policy's tuned model is a full network: give a policy with a LoRA, or without one")
    policy.pipe.to(accelerator.device)
    # An earlier training may have left its own autocast around the network's forward.
    policy.wrapped = accelerator.unwrap_model(policy.network, keep_fp32_wrapper=False)
    return policy


def prepare_policy(
    config: TrainConfig, accelerator: Accelerator, copies: Sequence[str] = (), policy: Policy | None = None
) -> tuple[Policy, torch.optim.AdamW, dict[str, list[nn.Parameter]]]:
    """Add a LoRA and an optimizer to a policy, and wrap them.

    Returns (policy, optimizer, frozen copies of the LoRA by name), wrapped by accelerate. policy: see `Given`.
    """
    engines.require_scaler(accelerator, config.dtype)
    policy = load_policy(config, accelerator, policy)
    if not policy.trainable():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            policy.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets)
    parameters = policy.trainable()
    frozen = {name: policy.add_frozen_copy(name) for name in copies}
    if config.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()
    if config.compile:
        policy.network.compile()  # `compile` works in place: the module and its parameters keep their names
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    engines.configure(accelerator, policy.network, config.batch_size, config.max_grad_norm)
    policy.wrapped, optimizer = accelerator.prepare(policy.network, optimizer)
    return policy, optimizer, frozen
