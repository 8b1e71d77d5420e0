"""A slider on a diffusers pipeline.

    guide = rlg.apply(pipe, "adapter"); guide.scale = 1.6; pipe("...")

The pipeline's denoiser is called twice, as base and as tuned model, and returns

    guided = base + w (tuned - base)

The classifier-free guidance of nearly all pipelines is linear in the denoiser's outputs. There, this equals guidance
of the two whole updates, for every scheduler that clips nothing. Other pipelines apply their rule to the guided
outputs (Qwen-Image's rescaling, `guidance_rescale`; see `rlg.integrations.cfg_rules`). docs/adapters.md says what is
tested with what.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlg.choices import CONSTANT, FULL
from rlg.guidance.guided import Weight, as_weight
from rlg.guidance.weight_schedule import WeightSchedule
from rlg.integrations import cfg_rules, diffusers_modes, guided_outputs
from rlg.integrations.diffusers_modes import PipelineMode
from rlg.integrations.guided_network import GuidedNetwork, LoraSwitch, Switch, WeightSwap, guided
from rlg.integrations.pipeline_steps import PipelineSteps
from rlg.models import adapter_files, full_networks, lora
from rlg.models.backbones.networks import DENOISERS, call_of
from rlg.models.tuned_model import TunedModel, resolve

_BESIDE = "rlg"  # name of an adapter beside others

OneTuned = str | Path | TunedModel
Tuned = OneTuned | Mapping[str, OneTuned]


class Guide:
    """Reinforcement Learning Guidance on a pipeline.

    `scale` and `schedule` may be changed between calls. `remove()` takes the guide off, and `unload()` the adapter as
    well. A `with` statement unloads the guide at its end.
    """

    def __init__(self, pipe: Any, guided_networks: Sequence[GuidedNetwork], label: str, mode: str = FULL):
        self.pipe, self.label, self.mode = pipe, label, mode
        self._scale: Weight = 1.0
        self._schedule = WeightSchedule.parse(CONSTANT)
        self._networks = list(guided_networks)
        self._steps = PipelineSteps(lambda: self.pipe.scheduler, self._networks[0].bare)
        parsed = diffusers_modes.parse(mode, isinstance(self._networks[0].switch, WeightSwap))
        self._one_batch = parsed.one_batch
        self._modes: dict[str, PipelineMode] = {}
        for network in self._networks:
            diffusers_modes.check_network(parsed, network, alone=len(self._networks) == 1)
            if not parsed.exact:
                self._modes[network.name] = PipelineMode(parsed, network, self._steps, lambda: self.pipe.scheduler)
        self._shorten = {network.name: call_of(network.bare).shorten() for network in self._networks}
        self._warned = False
        for network in self._networks:
            network.install(self._answer)

    @property
    def scale(self) -> Weight:
        """The weight w.

        It is a number, one number an image, or a function of the network's time that returns either.
        """
        return self._scale

    @scale.setter
    def scale(self, value: Any) -> None:
        self._scale = as_weight(value)

    @property
    def schedule(self) -> str:
        """The schedule of w over the steps, by name.

        It is one of `rlg.choices.SCHEDULES`, and says how much of w - 1 each step gets.
        """
        return str(self._schedule)

    @schedule.setter
    def schedule(self, value: str) -> None:
        self._schedule = WeightSchedule.parse(value)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The guided networks, by the pipeline's names for them."""
        return {network.name: network.bare for network in self._networks}

    def remove(self) -> None:
        """Take the guide off the pipeline.

        An adapter stays attached, at w = 1. Of a full network, only the base remains.
        """
        for network in self._networks:
            network.remove()

    def unload(self) -> None:
        """Take off the guide and what `rlg.apply` has attached.

        The pipeline is then as it was before.
        """
        self.remove()
        for network in self._networks:
            network.switch.release()

    def __enter__(self) -> Guide:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()

    def __repr__(self) -> str:
        on = all(guided(network.bare) is network for network in self._networks)
        where = ", ".join(self.networks)
        schedule = "" if self.schedule == CONSTANT else f", schedule={self.schedule!r}"
        state = "" if on else ", removed"
        return f"Guide({self.label!r} on {where}, w={self.scale}, mode={self.mode!r}{schedule}{state})"

    def _answer(self, network: GuidedNetwork, args: Any, kwargs: Any) -> Any:
        self._check_call(kwargs)
        step, begins = self._turn(args, kwargs)
        w = self._weight(step, args, kwargs)
        with self._shorten[network.name](network.bare, kwargs) as kwargs:
            if isinstance(w, float) and w in (0.0, 1.0):
                return (network.tuned if w else network.base)(args, kwargs)
            if self._one_batch:
                base, tuned = diffusers_modes.in_one_batch(network, args, kwargs)
            elif network.name in self._modes:
                return self._modes[network.name](w, args, kwargs, step, begins)
            else:
                base, tuned = network.base(args, kwargs), network.tuned(args, kwargs)
            return guided_outputs.lerp(base, tuned, w)

    def _check_call(self, kwargs: dict[str, Any]) -> None:
        """Warn once if the pipeline's CFG rule is not linear.

        Raises ValueError for a call whose two passes would share a memory.
        """
        if isinstance(self._scale, float) and self._scale in (0.0, 1.0):
            return
        guided_outputs.check_no_memory(kwargs)
        if not self._warned and (warning := cfg_rules.in_this_call(self.pipe)):
            self._warned = True
            warnings.warn(warning, stacklevel=2)

    def _turn(self, args: Any, kwargs: Any) -> tuple[int, bool]:
        """The step of this call, and whether it begins a run.

        They are only looked up if the schedule or a mode needs them.
        """
        if self.schedule == CONSTANT and not self._modes:
            return 0, False
        return self._steps.turn(_time(args, kwargs))

    def _weight(self, step: int, args: Any, kwargs: Any) -> float | Tensor:
        """The w of a call: a number, or one for each row.

        The rows are those of the denoiser's batch.
        """
        w = as_weight(self._scale(_time(args, kwargs))) if callable(self._scale) else self._scale
        assert not callable(w)
        if self.schedule != CONSTANT:
            share = self._schedule.shares(self._steps.steps)[step]
            w = 1 + share * (w - 1) if share else 1.0
        if isinstance(w, float):
            return w
        rows = guided_outputs.rows(w, _batch(args, kwargs), self._branches())
        return float(rows[0]) if bool((rows == rows[0]).all()) else rows

    def _branches(self) -> tuple[int, ...]:
        """Numbers of rows that an image may have in the denoiser's batch.

        It is empty if the pipeline says that its CFG is off.
        """
        with_cfg = getattr(self.pipe, "do_classifier_free_guidance", None)  # unknown before the first call
        return () if with_cfg is False else guided_outputs.BRANCHES


def _batch(args: Any, kwargs: Any) -> int:
    """The number of rows in a denoiser's call.

    It is the length of its first tensor, or of its first list of tensors.
    """
    value = next(each for each in (*args, *kwargs.values()) if isinstance(each, (Tensor, list)))
    return len(value)


def _time(args: Any, kwargs: Any) -> float:
    """The time that a denoiser is given.

    Of several times it is the latest, because a given first frame has time 0.
    """
    named = next((kwargs[name] for name in ("timestep", "timesteps") if name in kwargs), None)
    time = named if named is not None else args[1] if len(args) > 1 else None
    if time is None:
        raise ValueError("a function of t, a schedule or a mode needs a denoiser that takes `timestep`")
    return float(torch.as_tensor(time).max())


def apply(
    pipe: Any,
    tuned: Tuned | None = None,
    scale: Any = 1.0,
    mode: str = FULL,
    *,
    adapters: Sequence[str] | None = None,
    schedule: str = CONSTANT,
    denoisers: Sequence[str] | None = None,
) -> Guide:
    """Attach a tuned model to a diffusers pipeline and guide it.

    tuned: a checkpoint of this project, a PEFT folder, a diffusers or kohya LoRA file, or a full fine-tuned network
    (its folder, or a pipeline's). It is given by path or hub id, in safetensors. A full network is a second set of
    weights, and the memory of both is printed. A pipeline of several denoisers needs one model each: {"transformer":
    ..., "transformer_2": ...}.
    adapters: instead of `tuned`, names of adapters that the pipeline has loaded already. Only these are switched.
    scale: the weight w as a number, one number an image, or a function of t.
    mode: a cheaper way to run guidance (`rlg.guidance.modes`). `rlg.integrations.diffusers_modes` says which ones run.
    schedule: how much of w - 1 each step gets, by name (`rlg.guidance.weight_schedule`).
    denoisers: the networks to guide, by the pipeline's names. The default is all of them, and others run unchanged.
    Raises ValueError if an argument is unknown or does not fit, if the pipeline has no denoiser or is guided already,
    or if the tuned model is missing, damaged or made for another base.
    """
    weight, parsed = as_weight(scale), WeightSchedule.parse(schedule)
    chosen = _chosen(pipe, denoisers)
    sources = _sources(tuned, adapters, chosen)
    diffusers_modes.parse(mode, any(model is not None and model.is_network for model in sources.values()))
    for name in chosen:
        _check_free(pipe, name)
    if warning := cfg_rules.by_default(pipe):
        warnings.warn(warning, stacklevel=2)
    attached: list[GuidedNetwork] = []
    try:
        for name, model in sources.items():
            switch = _by_name(pipe, name, adapters or ()) if model is None else _attached(pipe, name, model)
            attached.append(GuidedNetwork(pipe, name, switch))
        label = ", ".join(adapters or dict.fromkeys(model.path for model in sources.values() if model))
        guide = Guide(pipe, attached, label, mode)
    except Exception:
        for network in attached:
            network.switch.release()
        raise
    guide.scale, guide.schedule = weight, str(parsed)
    return guide


def _chosen(pipe: Any, denoisers: Sequence[str] | None) -> list[str]:
    there = [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
    if not there:
        raise ValueError(f"{type(pipe).__name__} has no denoiser named {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]}")
    chosen = there if denoisers is None else list(dict.fromkeys(denoisers))
    if unknown := [name for name in chosen if name not in there] or (not chosen and ["none"]):
        raise ValueError(f"{type(pipe).__name__} has the denoisers {', '.join(there)}, and no {unknown[0]}")
    return chosen


def _sources(tuned: Tuned | None, names: Sequence[str] | None, chosen: list[str]) -> dict[str, TunedModel | None]:
    """The model that tunes each denoiser.

    It is None for adapters that the pipeline has loaded already.
    """
    if (tuned is None) == (names is None) or isinstance(names, str) or names == []:
        raise ValueError('give what is tuned, or the names of loaded adapters as a list: adapters=["NAME"]')
    if tuned is None:
        return dict.fromkeys(chosen)
    if isinstance(tuned, Mapping):
        if tuned.keys() != set(chosen):
            raise ValueError(f"what is tuned is given for {', '.join(tuned)}; the denoisers are {', '.join(chosen)}")
        return {name: resolve(tuned[name]) for name in chosen}
    if len(chosen) > 1:
        example = ", ".join(f'"{name}": ...' for name in chosen)
        raise ValueError(
            f"the pipeline has {len(chosen)} denoisers and one tuned model is given; give one each, {{{example}}}, or "
            f'say which is guided: denoisers=["{chosen[0]}"]'
        )
    return {chosen[0]: resolve(tuned)}


def _check_free(pipe: Any, name: str) -> None:
    """Raise ValueError if a network is guided already.

    A guide whose adapter was unloaded is removed instead.
    """
    before = guided(getattr(pipe, name))
    if before is None:
        return
    switch = before.switch
    if isinstance(switch, LoraSwitch) and not lora.carrying(before.bare, switch.names):
        before.remove()
    else:
        raise ValueError(f"the {name} is guided already; call unload() on its guide first")


def _attached(pipe: Any, name: str, model: TunedModel) -> Switch:
    network = lora.unwrapped(getattr(pipe, name))
    if model.is_network:
        tuned = full_networks.load(pipe, name, model.source, with_lora=True)
        print(full_networks.memory(network, tuned), file=sys.stderr)
        return WeightSwap(network, tuned)
    there = lora.names_of(network) + list(getattr(network, "peft_config", {}))
    free = (f"{_BESIDE}{i or ''}" for i in range(len(there) + 1))
    own = next(each for each in free if each not in there) if there else adapter_files.NAME
    adapter_files.load(pipe, name, model.adapter, own, beside=True)
    return LoraSwitch(network, [own], owned=True)


def _by_name(pipe: Any, name: str, names: Sequence[str]) -> Switch:
    """The switch of adapters that are loaded already.

    Raises ValueError if one is not loaded, or also changes another part.
    """
    network = lora.unwrapped(getattr(pipe, name))
    for each in names:
        if not lora.carrying(network, [each]):
            there = ", ".join(lora.names_of(network)) or "none"
            raise ValueError(f"the {name} carries no adapter named {each!r}; those that it carries: {there}")
    if also := [part for part in lora.other_parts(pipe, network, names) if part not in DENOISERS]:
        raise ValueError(f"the adapter also changes the {also[0]}, which guidance can't switch between its passes")
    return LoraSwitch(network, names, owned=False)
