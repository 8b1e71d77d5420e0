"""What a model family has to say about itself: a frozen record of functions, and the conditioning that it passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: the network's text inputs by name, all with the batch first."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Conditioning:
        """Some rows; a tensor of indices may be on another device than some of the tensors."""
        return Conditioning(
            {k: v[index.to(v.device) if isinstance(index, Tensor) else index] for k, v in self.tensors.items()}
        )

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As `Tensor.to`, on every tensor."""
        return Conditioning({k: v.to(*args, **kwargs) for k, v in self.tensors.items()})

    def repeat_interleave(self, times: int) -> Conditioning:
        """Each prompt `times` times in a row."""
        return Conditioning({k: v.repeat_interleave(times, dim=0) for k, v in self.tensors.items()})

    def expand(self, batch: int) -> Conditioning:
        """One prompt's conditioning for a whole batch, without a copy."""
        return Conditioning({k: v.expand(batch, *v.shape[1:]) for k, v in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch."""
        return Conditioning({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})


def _sizeless(cond: Conditioning, sizes_B2: Tensor, crops_B2: Tensor, side: int) -> Conditioning:
    return cond


@dataclass(frozen=True)
class Backbone:
    """A model family."""

    denoiser_name: str  # the pipeline's attribute that holds the network
    text_encoders: tuple[str, ...]  # the pipeline's attributes that hold text encoders
    lora_targets: tuple[str, ...]  # default LoRA target modules
    encode: Callable[[Any, Sequence[str]], Conditioning]  # (pipe, prompts) -> conditioning
    forward: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]  # (network, x_BCHW, t_B, cond) -> out_BCHW
    prepare: Callable[[Any], None] = lambda pipe: None  # called once on a pipeline that we load ourselves
    with_sizes: Callable[[Conditioning, Tensor, Tensor, int], Conditioning] = _sizeless  # see `Policy.with_sizes`

    def denoiser(self, pipe: Any) -> nn.Module:
        """The network of a pipeline."""
        return getattr(pipe, self.denoiser_name)

    def latent_shape(self, pipe: Any, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image of height x width pixels. Raises ValueError for other sizes."""
        factor = pipe.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(f"image size {height}x{width} is not a multiple of {factor}")
        return self.denoiser(pipe).config.in_channels, height // factor, width // factor

    def decode(self, pipe: Any, latents_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], fp32."""
        config = pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        latents = (latents_BCHW / config.scaling_factor + shift).to(pipe.vae.dtype)
        return (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, pipe: Any, images_B3HW: Tensor) -> Tensor:
        """Latents (B, C, H, W), fp32, of images in [0, 1]: the posterior's mean."""
        config = pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        latents = pipe.vae.encode((images_B3HW * 2 - 1).to(pipe.vae.dtype)).latent_dist.mode()
        return (latents.float() - shift) * config.scaling_factor
