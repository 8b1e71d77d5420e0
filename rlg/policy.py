"""A policy: a diffusers pipeline, its noise process, and a LoRA that can be switched off.

The network with the adapter on is the tuned model, and with the adapter off it is the reference model: one set of
weights, never a copy (only a full fine-tuned network, made elsewhere, is a second one). `predict` and `reference` have
one signature, (x_BCHW, t_B, conditioning) -> out_BCHW.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlg import adapters, networks
from rlg.backbones import Conditioning, backbone_of
from rlg.config import read_json
from rlg.process import Process, Schedule, config_of, make_schedule, process_from_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ENCODE_BATCH = 64
_MOST_LAYERS, _LARGEST_SIZE = 1000, 2**20  # of a network; the largest vocabulary of a text encoder has 2^18 words


class Policy:
    """A pipeline as reinforcement learning sees it."""

    def __init__(self, pipe: DiffusionPipeline, base: str):
        self.pipe = pipe
        self.base = base  # where the pipeline came from: a hub id or a path
        self.backbone = backbone_of(pipe)
        self.backbone.prepare(pipe)
        self.network: nn.Module = self.backbone.denoiser(pipe)
        self.wrapped: nn.Module = self.network  # the accelerate-wrapped network while training
        self.tuned: nn.Module | None = None  # a full fine-tuned network, in place of an adapter
        self.scheduler_config: Mapping[str, Any] = config_of(pipe.scheduler)
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @classmethod
    def load(cls, base: str, dtype: str = "float32", device: torch.device | str = "cpu") -> Policy:
        """Load a pipeline folder, a hub id or the name of a tinyworld model ("tiny-sd3").

        Raises ValueError for an unknown family or dtype, a missing or incomplete folder, and pickled weights.
        """
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        _check_family(base)
        pipe = load_pipeline(base, DTYPES[dtype])
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device), base)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def schedule(self, steps: int, kernel: str, level: float, window: tuple[int, int] | None = None) -> Schedule:
        """The reverse process of this model on its device; see `process.make_schedule`."""
        return make_schedule(self.scheduler_config, steps, kernel, level, window).to(self.device)

    def process(self) -> Process:
        """The forward process of this model."""
        return process_from_config(self.scheduler_config)

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square image; None is the model's own size."""
        side = resolution or self.image_size()
        return self.backbone.latent_shape(self.pipe, side, side)

    def image_size(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return self.network.config.sample_size * self.pipe.vae_scale_factor

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, in bounded batches."""
        chunks = [prompts[i : i + _ENCODE_BATCH] for i in range(0, len(prompts), _ENCODE_BATCH)]
        return Conditioning.cat([self.backbone.encode(self.pipe, chunk) for chunk in chunks])

    def with_sizes(self, cond: Conditioning, sizes_B2: Tensor, crops_B2: Tensor, side: int) -> Conditioning:
        """Conditioning that also says (height, width) before resizing, (top, left) of the crop and the final side.

        The same conditioning for a family that does not take them.
        """
        return self.backbone.with_sizes(cond, sizes_B2, crops_B2, side)

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor, batch: int = 64) -> Tensor:
        """Latents (B, C, H, W), fp32, of images in [0, 1], encoded `batch` at a time."""
        parts = images_B3HW.to(self.device).split(batch)
        return torch.cat([self.backbone.encode_image(self.pipe, part) for part in parts])

    def predict(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The tuned model's output: adapter on, or the full network. Goes through the accelerate-wrapped network."""
        network = self.wrapped if self.tuned is None else self.tuned
        return self.backbone.forward(network, x_BCHW, t_B, cond)

    def reference(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The base model's output: adapter off. Goes through the bare network."""
        with self.adapter_off():
            return self.backbone.forward(self.network, x_BCHW, t_B, cond)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within, the policy is the base model."""
        tuned, self.tuned = self.tuned, None
        try:
            with adapters.disabled(self.network):
                yield
        finally:
            self.tuned = tuned

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, batch: int = 64) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], fp32, decoded `batch` at a time."""
        return torch.cat([self.backbone.decode(self.pipe, part) for part in latents_BCHW.split(batch)])

    def add_lora(self, rank: int, alpha: int, targets: Sequence[str] | None = None) -> list[nn.Parameter]:
        """Attach a new LoRA (fp32, Gaussian A, zero B) and return its parameters.

        Raises ValueError if no module is named by `targets`.
        """
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=list(targets or self.backbone.lora_targets),
        )
        self.network.add_adapter(config)
        return self.trainable()

    def add_frozen_copy(self, name: str) -> list[nn.Parameter]:
        """Attach a second adapter that begins as a copy of the LoRA and gets no gradients; returns its parameters."""
        self.network.add_adapter(copy.deepcopy(self.network.peft_config[adapters.NAME]), name)
        self.network.set_adapter(adapters.NAME)
        frozen = self._adapter(name)
        for parameter, source in zip(frozen, self.trainable(), strict=True):
            parameter.data = source.detach().clone()
            parameter.requires_grad_(False)
        return frozen

    def load_frozen_copy(self, name: str, file: Path) -> None:
        """Attach a second adapter of the LoRA's shape, from the weights that a trainer keeps of it (NFT's old policy).

        Raises ValueError if the file is missing, damaged or of another shape, or the tuned model is a full network.
        """
        if self.tuned is not None:
            raise ValueError(f"the tuned model is a full network, which has no second adapter as in {file}")
        try:
            saved = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is missing or damaged: {error}") from error
        parameters = self.trainable()
        values = [saved[str(i)] for i in range(len(saved)) if str(i) in saved]
        if [tuple(v.shape) for v in values] != [tuple(p.shape) for p in parameters]:
            raise ValueError(f"{file} holds no second adapter of the one that is loaded")
        for parameter, value in zip(self.add_frozen_copy(name), values, strict=True):
            parameter.data.copy_(value)

    def load_expert(self, name: str, path: str | Path) -> None:
        """Attach a further adapter under a name of its own, frozen, from any file that `load_adapter` reads.

        Rank, alpha and layers may differ from the first one's, which stays the one that `predict` runs; `predict_as`
        runs this one. Raises ValueError as `load_adapter`, and for a full network, given here or loaded before.
        """
        if self.tuned is not None or networks.is_network(path):
            raise ValueError(f"{path}: experts are adapters of one network, and a full network is given; give LoRAs")
        adapter = adapters.load(self.pipe, self.backbone.denoiser_name, path, name)
        adapters.to_float32(self.network, adapter, name)
        self.network.set_adapter(adapters.NAME)  # which also freezes the others
        self.trainable()

    def predict_mixed(self, weights: Mapping[str, float], x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The output of the network whose weights are base + sum of w * (the adapter's dense update), in one pass."""
        with adapters.mixed(self.network, weights):
            return self.backbone.forward(self.network, x_BCHW, t_B, cond)

    def predict_as(self, name: str, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The output with another adapter of the network on. Goes through the bare network."""
        with adapters.active(self.network, name):
            return self.backbone.forward(self.network, x_BCHW, t_B, cond)

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's parameters, kept in fp32 over a base of any dtype."""
        parameters = self._adapter(adapters.NAME)
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return parameters

    def _adapter(self, name: str) -> list[nn.Parameter]:
        return [p for key, p in self.network.named_parameters() if ".lora_" in key and f".{name}." in key]

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder and as a diffusers LoRA file; see `adapters.save`."""
        adapters.save(self.pipe, self.backbone.denoiser_name, folder, self.base)

    def load_adapter(self, path: str | Path) -> None:
        """Attach a trained adapter: our checkpoint, a PEFT folder, a diffusers or kohya LoRA file, or a hub id.

        Raises ValueError if it is missing, damaged, pickled or made for another base.
        """
        assert self.tuned is None, "a full network is loaded: the adapter would change the base"
        adapter = adapters.load(self.pipe, self.backbone.denoiser_name, path)
        adapters.to_float32(self.network, adapter)
        self.trainable()

    def load_tuned(self, path: str | Path) -> None:
        """Take an adapter (`load_adapter`) or a full fine-tuned network (`networks.load`) as the tuned model.

        Raises ValueError if it is missing, damaged, pickled or made for another base.
        """
        if networks.is_network(path):
            self.tuned = networks.load(self.pipe, self.backbone.denoiser_name, path)
        else:
            self.load_adapter(path)


def base_of(tuned: str | Path, base: str | None) -> str:
    """The base model to use: the one given, or else the one that an adapter names.

    Raises ValueError if there is neither, or the tuned model is missing; or damaged, if it is an adapter.
    """
    named = None if networks.is_network(tuned) else adapters.read(tuned).base
    base = base or named
    if not base:
        raise ValueError(f"{tuned} does not say what it was trained on; give --base")
    return base


def load_pipeline(base: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A diffusers pipeline of any class from a folder, a hub id or a tinyworld name; safetensors only.

    Raises ValueError if it is missing, incomplete, damaged or pickled.
    """
    with _loading(base):
        location = _location(base)
        _check_configs(Path(location))
        return DiffusionPipeline.from_pretrained(location, dtype=dtype, use_safetensors=True)


def _check_configs(folder: Path) -> None:
    """Raise ValueError for configs in a local folder that ask for more than a model has, before it is set up."""
    for pattern in ("model_index.json", "*/config.json", "*/scheduler_config.json"):
        for file in sorted(folder.glob(pattern)):
            waiting = list(read_json(file).items())
            while waiting:
                key, value = waiting.pop()
                if isinstance(value, (dict, list)):
                    if len(value) > _MOST_LAYERS and isinstance(value, list):
                        raise ValueError(f"{file}: {key} has {len(value)} entries")
                    waiting += value.items() if isinstance(value, dict) else [(key, each) for each in value]
                elif type(value) is int and value > (_MOST_LAYERS if "layer" in key else _LARGEST_SIZE):
                    raise ValueError(f"{file}: {key} is {value}")


def _check_family(base: str) -> None:
    """Refuse a folder of an unknown family before gigabytes are read."""
    with _loading(base):
        location = _location(base)
        name = DiffusionPipeline.load_config(location)["_class_name"] if Path(location).is_dir() else None
    if name is not None:
        backbone_of(name)


def _location(base: str) -> str:
    from rlg import tinyworld

    if base in tinyworld.NAMES:
        return str(tinyworld.path(base))
    if not Path(base).is_dir() and (base.count("/") != 1 or base.startswith(("/", ".", "~"))):
        raise ValueError(f"it is no folder, no hub id (NAME/MODEL) and none of {', '.join(tinyworld.NAMES)}")
    return base


@contextmanager
def _loading(base: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # diffusers and the hub raise whatever they meet
        reason = textwrap.shorten(str(error), 240)
        raise ValueError(f"cannot load the base model {base!r}: {reason}") from error
