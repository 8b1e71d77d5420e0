"""A policy: a pipeline, its noise process, and a switchable LoRA.

The network with the adapter on is the tuned model. With the adapter off, it is the reference model. Both have the same
weights, and there is no copy. (A full fine-tuned network is a second one.) `predict` and `reference` have one
signature:

    (x_BCHW, t_B, conditioning) -> out_BCHW
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Process, Schedule, config_of
from rlg.models import adapter_files, full_networks, lora
from rlg.models.backbones import Backbone, backbone_of
from rlg.models.loading import DTYPES, check_family, load_pipeline, warn_if_emulated
from rlg.models.tuned_model import TunedModel, resolve

_ENCODE_BATCH = 64
# Bytes of one channel in the autoencoder: 4 images of 1024 x 1024 in bfloat16, which take about 6 GiB.
_BYTES_AT_ONCE = 2**23
# An image's graph takes as much as 8 images take without one: 12 GiB for 1024 x 1024 in bfloat16.
_GRAPH = 8


class Policy:
    """A pipeline as reinforcement learning uses it."""

    def __init__(self, pipe: DiffusionPipeline, base: str, t5_length: int | None = None):
        self.pipe = pipe
        self.base = base  # hub id or path of the pipeline
        self.backbone = backbone_of(pipe)
        self._encoding = _encoding(self.backbone, t5_length, base)
        self.backbone.prepare(pipe)
        self.network: nn.Module = self.backbone.denoiser(pipe)
        self.wrapped: nn.Module = self.network  # the accelerate-wrapped network while training
        self.tuned: nn.Module | None = None  # a full fine-tuned network, instead of an adapter
        self.watch: Callable[[Tensor], None] = lambda out: None  # called with each output of `predict`
        self.scheduler_config: Mapping[str, Any] = config_of(pipe.scheduler)
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        base: str,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        *,
        t5_length: int | None = None,
        vae_dtype: str | None = None,
    ) -> Policy:
        """Load a policy by folder, hub id or tinyworld name.

        t5_length: tokens of a prompt that T5 is given (default: the pipeline's own). vae_dtype: of the autoencoder
        (default: dtype, or float32 where that overflows). Raises ValueError for an unknown family or dtype, a length
        that the family does not have, a missing or incomplete folder, and pickled weights.
        """
        for name in (dtype, vae_dtype or dtype):
            if name not in DTYPES:
                raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
        check_family(base)
        warn_if_emulated(dtype, device)
        pipe = load_pipeline(base, DTYPES[dtype])
        pipe.set_progress_bar_config(disable=True)
        policy = cls(pipe.to(device), base, t5_length)
        if vae_dtype:
            pipe.vae.to(DTYPES[vae_dtype])
        return policy

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def schedule(
        self,
        steps: int,
        kernel: str,
        level: float,
        window: tuple[int, int] | None = None,
        *,
        resolution: int | None = None,
    ) -> Schedule:
        """The reverse process of square images, on the policy's device.

        See `process.make_schedule`. resolution: as for `latent_shape`. Some schedulers shift their noise levels by it.
        """
        made = self.backbone.schedule(self.pipe, self.scheduler_config, steps, kernel, level, window, resolution)
        return made.to(self.device)

    def process(self, resolution: int | None = None) -> Process:
        """The forward process of square images.

        resolution: as for `schedule`.
        """
        return self.backbone.forward_process(self.pipe, self.scheduler_config, resolution)

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square image.

        resolution: in pixels; None is the model's own size.
        """
        side = resolution or self.image_size()
        return self.backbone.latent_shape(self.pipe, self.network, side, side)

    def image_size(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return self.backbone.image_size(self.pipe, self.network)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, in bounded batches."""
        chunks = [prompts[i : i + _ENCODE_BATCH] for i in range(0, len(prompts), _ENCODE_BATCH)]
        return Conditioning.cat([self.backbone.encode(self.pipe, chunk, **self._encoding) for chunk in chunks])

    def with_sizes(self, cond: Conditioning, sizes_B2: Tensor, crops_B2: Tensor, side: int) -> Conditioning:
        """Conditioning that also holds image sizes, for families that take them.

        The sizes are (height, width) before resizing, (top, left) of the crop, and the final side. Other families get
        the same conditioning back.
        """
        return self.backbone.with_sizes(cond, sizes_B2, crops_B2, side)

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor, batch: int = 64) -> Tensor:
        """Latents (B, C, H, W), fp32, of images in [0, 1].

        The batch is encoded in parts of `batch` images, or of fewer if the images are large.
        """
        parts = images_B3HW.to(self.device).split(self._at_once(batch, *images_B3HW.shape[2:]))
        return torch.cat([self.backbone.encode_image(self.pipe, part) for part in parts])

    def predict(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The tuned model's output: adapter on, or the full network.

        The pass goes through the accelerate-wrapped network.
        """
        network = self.wrapped if self.tuned is None else self.tuned
        out = self.backbone.forward(network, x_BCHW, t_B, cond)
        self.watch(out)
        return out

    def reference(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The base model's output: adapter off.

        The pass goes through the bare network.
        """
        with self.adapter_off():
            return self.backbone.forward(self.network, x_BCHW, t_B, cond)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Make the policy the base model, inside a context."""
        tuned, self.tuned = self.tuned, None
        try:
            with lora.disabled(self.network):
                yield
        finally:
            self.tuned = tuned

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, batch: int = 64) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], fp32.

        The batch is decoded in parts of `batch` images, or of fewer if the images are large.
        """
        parts = latents_BCHW.split(self._at_once(batch, *self._pixels(latents_BCHW)))
        return torch.cat([self.backbone.decode(self.pipe, part) for part in parts])

    def decode_with_grad(self, latents_BCHW: Tensor, batch: int = 64) -> Tensor:
        """Images as `decode` makes them, with a graph to the latents.

        Parts are smaller than those of `decode`, and only the images are kept. The backward pass decodes a part again,
        so it holds the activations of one part at a time. The autoencoder gets no gradient. A pixel that is clamped
        to [0, 1] has none.
        """
        parts = latents_BCHW.split(self._at_once(batch, *self._pixels(latents_BCHW), cost=_GRAPH))

        def decode(part_BCHW: Tensor) -> Tensor:
            return self.backbone.decode(self.pipe, part_BCHW)

        # An autoencoder draws nothing when it decodes, so there is no state of a generator to keep.
        return torch.cat([checkpoint(decode, part, use_reentrant=False, preserve_rng_state=False) for part in parts])

    def _pixels(self, latents_BCHW: Tensor) -> tuple[int, int]:
        """Height and width of the images of latents."""
        height, width = (self.pipe.vae_scale_factor * side for side in latents_BCHW.shape[2:])
        return height, width

    def _at_once(self, batch: int, height: int, width: int, cost: int = 1) -> int:
        """Number of images that go through the autoencoder together.

        Its memory grows with their pixels. cost: an image takes the memory of so many.
        """
        pixel_bytes = height * width * self.pipe.vae.dtype.itemsize
        return max(1, min(batch, _BYTES_AT_ONCE // (cost * pixel_bytes)))

    def add_lora(self, rank: int, alpha: int, targets: Sequence[str] | None = None) -> list[nn.Parameter]:
        """Attach a new LoRA and return its parameters.

        A is Gaussian, B is zero, and both are fp32. Raises ValueError if `targets` name no module.
        """
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=list(targets or self.backbone.lora_targets),
        )
        lora.attach(self.network, config, adapter_files.NAME)
        return self.trainable()

    def add_frozen_copy(self, name: str) -> list[nn.Parameter]:
        """Attach a frozen copy of the LoRA, and return its parameters."""
        lora.attach(self.network, copy.deepcopy(self.network.peft_config[adapter_files.NAME]), name)
        lora.activate(self.network, adapter_files.NAME)
        frozen = self._adapter(name)
        for parameter, source in zip(frozen, self.trainable(), strict=True):
            parameter.data = source.detach().clone()
            parameter.requires_grad_(False)
        return frozen

    def load_frozen_copy(self, name: str, file: Path) -> None:
        """Attach a frozen adapter of the LoRA's shape from a file.

        A trainer keeps it (NFT's old policy). Raises ValueError if the file is missing, damaged or of another shape,
        or if the tuned model is a full network.
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

    def load_expert(self, name: str, tuned: str | Path | TunedModel) -> None:
        """Attach a further adapter, frozen and under its own name.

        tuned: any file that `load_adapter` reads. Rank, alpha and layers may differ from those of the first adapter.
        `predict` still runs the first one; `predict_as` runs this one. Raises ValueError as `load_adapter` does, and
        if this or the tuned model is a full network.
        """
        model = resolve(tuned)
        if self.tuned is not None or model.is_network:
            given = f"{model.path}: experts are adapters of one network, and a full network is given"
            raise ValueError(f"{given}; give LoRAs")
        adapter = adapter_files.load(self.pipe, self.backbone.denoiser_name, model.adapter, name)
        adapter_files.to_float32(self.network, adapter, name)
        lora.activate(self.network, adapter_files.NAME)
        self.trainable()

    def predict_mixed(self, weights: Mapping[str, float], x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The output with a weighted sum of adapters, in one pass.

        The weights of the network are base + sum of w * (the adapter's dense update).
        """
        with lora.mixed(self.network, weights):
            return self.backbone.forward(self.network, x_BCHW, t_B, cond)

    def predict_as(self, name: str, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The output with another adapter of the network on.

        The pass goes through the bare network.
        """
        with lora.active(self.network, name):
            return self.backbone.forward(self.network, x_BCHW, t_B, cond)

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's parameters, kept in fp32 over a base of any dtype."""
        parameters = self._adapter(adapter_files.NAME)
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return parameters

    def _adapter(self, name: str) -> list[nn.Parameter]:
        return [p for key, p in self.network.named_parameters() if ".lora_" in key and f".{name}." in key]

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder and a diffusers file.

        See `adapter_files.save`.
        """
        adapter_files.save(self.pipe, self.backbone.denoiser_name, folder, self.base)

    def load_adapter(self, tuned: str | Path | TunedModel) -> None:
        """Attach a trained adapter.

        tuned: a checkpoint of this project, a PEFT folder, a diffusers or kohya LoRA file, or a hub id. Raises
        ValueError if it is missing, damaged, pickled or made for another base.
        """
        assert self.tuned is None, "a full network is loaded: the adapter would change the base"
        adapter = adapter_files.load(self.pipe, self.backbone.denoiser_name, resolve(tuned).adapter)
        adapter_files.to_float32(self.network, adapter)
        self.trainable()

    def load_tuned(self, tuned: str | Path | TunedModel) -> None:
        """Load an adapter or a full fine-tuned network as the tuned model.

        See `load_adapter` and `full_networks.load`. Raises ValueError if it is missing, damaged, pickled or made for
        another base.
        """
        model = resolve(tuned)
        if model.is_network:
            self.tuned = full_networks.load(self.pipe, self.backbone.denoiser_name, model.source)
        else:
            self.load_adapter(model)


def _encoding(backbone: Backbone, t5_length: int | None, base: str) -> dict[str, int]:
    """Options of the backbone's `encode`.

    Raises ValueError for a length that the family does not have.
    """
    if t5_length is None:
        return {}
    if not 1 <= t5_length <= backbone.max_t5_length:
        limit = f"takes 1 to {backbone.max_t5_length} tokens" if backbone.max_t5_length else "has no T5"
        raise ValueError(f"t5_length is {t5_length}, but {base} {limit}")
    return {"t5_length": t5_length}
