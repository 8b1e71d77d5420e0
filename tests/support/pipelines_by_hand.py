"""Tiny pipelines under `rlg.apply`, and the same pipelines guided by hand.

The reference has two networks of its own, base and tuned, the latter with the LoRA added to its weights. In their
pipeline the denoiser calls both and returns base + w (tuned - base). Results agree to rounding only, as merged weights
are other products: fp32 and 2 to 4 steps leave 3e-6 of the largest value, and 1e-4 is allowed. The LoRA changes the
latents by 1e-2 of it and more.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rlg
from tests.support.by_hand import combine
from tests.support.tiny_other_pipelines import OTHERS
from tests.support.tiny_pipelines import IMAGES, TinyPipeline
from tests.support.tiny_video_pipelines import VIDEOS

PIPELINES = {**IMAGES, **OTHERS, **VIDEOS}
RANK, ALPHA = 4, 8
AGREE, MATTERS = 1e-4, 1e-2  # of the largest value of a result
Weights = Callable[[int, float], float]  # w of the denoiser's call of that number, which is told that time


def lora_tensors(network: nn.Module, targets: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """A random LoRA, whose update is as large as the weights that it changes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear):
            up, down = (module.out_features, RANK), (RANK, module.in_features)
            tensors[f"{name}.lora_A.weight"] = torch.randn(down, generator=generator) * module.in_features**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(up, generator=generator) / RANK
    assert tensors
    return tensors


def peft_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers).save_pretrained(folder)
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def with_lora(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of a network with alpha / r * B A added to its weights."""
    tuned = copy.deepcopy(network)
    for name in {key.partition(".lora_")[0] for key in tensors}:
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        tuned.get_submodule(name).weight.data += ALPHA / RANK * up @ down
    return tuned


def guide_by_hand(network: nn.Module, tensors: dict[str, Tensor], weights: Weights) -> None:
    """Replace a denoiser's forward by base and tuned model, two other networks."""
    base, tuned, calls = copy.deepcopy(network), with_lora(network, tensors), []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if hasattr(network, "set_attn_processor"):  # pipelines put theirs into the network that they hold
            for each in (base, tuned):
                each.set_attn_processor(dict(network.attn_processors))
        time = kwargs.get("timestep", args[1] if len(args) > 1 else 0.0)
        calls.append(float(torch.as_tensor(time).max()))
        w = weights(len(calls) - 1, calls[-1])
        return combine(base(*args, **kwargs), tuned(*args, **kwargs), w)

    network.forward = forward


def result(pipe: Any, tiny: TinyPipeline, **options: Any) -> list[Tensor]:
    """What a call of a pipeline returns: latents of images, of a video, of sound."""
    torch.manual_seed(0)  # some pipelines encode images with noise from torch's own generator
    out = tree_leaves(pipe(**tiny.call() | options))
    leaves = [torch.as_tensor(each) for each in out if isinstance(each, Tensor | np.ndarray)]
    assert leaves and all(bool(leaf.isfinite().all()) for leaf in leaves)
    return leaves


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of two results, of the largest value of the second."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


class Case:
    """A tiny pipeline under `rlg.apply` with a LoRA for each denoiser, and the same guided by hand."""

    def __init__(self, tiny: TinyPipeline, folder: Path, scheduler: Any = None):
        self.tiny, self.scheduler = tiny, scheduler
        self.pipe = self.build()
        nets = {name: getattr(self.pipe, name) for name in tiny.denoisers}
        self.tensors = {name: lora_tensors(net, tiny.targets, seed) for seed, (name, net) in enumerate(nets.items())}
        self.folders = {name: peft_folder(folder / name, tensors) for name, tensors in self.tensors.items()}
        self.tuned = self.folders if len(self.folders) > 1 else self.folders[tiny.denoisers[0]]

    def build(self) -> Any:
        pipe = self.tiny.build()
        if self.scheduler is not None:
            pipe.scheduler = copy.deepcopy(self.scheduler)
        return pipe

    def plain(self, **options: Any) -> list[Tensor]:
        return result(self.build(), self.tiny, **options)

    def guided(self, scale: Any, **options: Any) -> list[Tensor]:
        self.guide.scale = scale
        return result(self.pipe, self.tiny, **options)

    def by_hand(self, weights: Weights | float, **options: Any) -> list[Tensor]:
        pipe = self.build()
        of_call = weights if callable(weights) else lambda *_: weights
        for name, tensors in self.tensors.items():
            guide_by_hand(getattr(pipe, name), tensors, of_call)
        return result(pipe, self.tiny, **options)


def applied(name: str, folder: Path, scheduler: Any = None) -> Case:
    """A tiny pipeline under `rlg.apply`, by name."""
    made = Case(PIPELINES[name], folder, scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made.guide = rlg.apply(made.pipe, made.tuned)
    return made
