"""The record of functions that describes a model family.

Its defaults fit a network that works directly on the latents of a convolutional autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Process, Schedule


def _sizeless(cond: Conditioning, sizes_B2: Tensor, crops_B2: Tensor, side: int) -> Conditioning:
    return cond


def _guidance_scale(scale: float) -> dict[str, Any]:
    return {"guidance_scale": scale}


def latent_shape(pipe: Any, network: nn.Module, height: int, width: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an image of this size in pixels.

    Raises ValueError for a size that the autoencoder does not take.
    """
    factor = pipe.vae_scale_factor
    if height % factor or width % factor:
        raise ValueError(f"image size {height}x{width} is not a multiple of {factor}")
    return network.config.in_channels, height // factor, width // factor


def image_size(pipe: Any, network: nn.Module) -> int:
    """Side in pixels of the images that the model was trained on."""
    return network.config.sample_size * pipe.vae_scale_factor


def image_tokens(network: nn.Module, latent_shape_CHW: tuple[int, int, int]) -> int:
    """Length of an image in the network's sequence.

    It is the area of the latents, counted in patches of the network.
    """
    _, height, width = latent_shape_CHW
    patch = getattr(network.config, "patch_size", None) or 1
    return (height // patch) * (width // patch)


def mu(config: Mapping[str, Any], tokens: int, steps: int) -> float:
    """`process.linear_mu` for any number of steps."""
    return process.linear_mu(config, tokens)


def decode(pipe: Any, latents_BCHW: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], fp32."""
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    latents = (latents_BCHW / config.scaling_factor + shift).to(pipe.vae.dtype)
    return (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


def encode_image(pipe: Any, images_B3HW: Tensor) -> Tensor:
    """Latents (B, C, H, W), fp32, of images in [0, 1].

    They are the posterior's mean.
    """
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    latents = pipe.vae.encode((images_B3HW * 2 - 1).to(pipe.vae.dtype)).latent_dist.mode()
    return (latents.float() - shift) * config.scaling_factor


@dataclass(frozen=True)
class Backbone:
    """A model family."""

    denoiser_name: str  # the pipeline's attribute that holds the network
    text_encoders: tuple[str, ...]  # the pipeline's attributes that hold text encoders
    lora_targets: tuple[str, ...]  # default LoRA target modules
    # (pipe, prompts) -> conditioning, with the same length for all prompts. With a T5 it also takes t5_length.
    encode: Callable[..., Conditioning]
    forward: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]  # (network, x_BCHW, t_B, cond) -> out_BCHW
    prepare: Callable[[Any], None] = lambda pipe: None  # called once on a pipeline that this project loads
    with_sizes: Callable[[Conditioning, Tensor, Tensor, int], Conditioning] = _sizeless  # see `Policy.with_sizes`
    max_t5_length: int = 0  # most tokens that its T5 takes; 0 if it has no T5
    latent_shape: Callable[[Any, nn.Module, int, int], tuple[int, int, int]] = latent_shape  # height, width in pixels
    image_size: Callable[[Any, nn.Module], int] = image_size
    decode: Callable[[Any, Tensor], Tensor] = decode
    encode_image: Callable[[Any, Tensor], Tensor] = encode_image
    image_tokens: Callable[[nn.Module, tuple[int, int, int]], int] = image_tokens  # (network, latents' (C, H, W))
    mu: Callable[[Mapping[str, Any], int, int], float] = mu  # (scheduler config, image tokens, steps), see `process`
    sigmas: Callable[[int], Sequence[float] | None] = lambda steps: None  # its pipeline gives them to its scheduler
    pipeline_cfg: Callable[[float], dict[str, Any]] = _guidance_scale  # its pipeline's options for a scale of CFG

    def denoiser(self, pipe: Any) -> nn.Module:
        """The network of a pipeline."""
        return getattr(pipe, self.denoiser_name)

    def forward_process(self, pipe: Any, config: Mapping[str, Any], side: int | None = None) -> Process:
        """The forward process of square images, for a scheduler config.

        side: in pixels; None is the side that the model was trained on. Raises ValueError as
        `process.process_from_config` does, and for a side that the family does not have.
        """
        return process.process_from_config(config, self._mu(pipe, config, process.TRAINING_TIMES, side))

    def schedule(
        self,
        pipe: Any,
        config: Mapping[str, Any],
        steps: int,
        kernel: str,
        level: float,
        window: tuple[int, int] | None = None,
        side: int | None = None,
    ) -> Schedule:
        """The reverse process of square images, for a scheduler config.

        side: in pixels; None is the side that the model was trained on. Raises ValueError as `process.make_schedule`
        does, and for a side that the family does not have.
        """
        how_far = self._mu(pipe, config, steps, side)
        return process.make_schedule(config, steps, kernel, level, window, mu=how_far, sigmas=self.sigmas(steps))

    def _mu(self, pipe: Any, config: Mapping[str, Any], steps: int, side: int | None) -> float | None:
        """The shift of noise levels for an image of this size.

        It is None where the size shifts nothing.
        """
        if not process.shifts_by_size(config):
            return None
        network = self.denoiser(pipe)
        side = side or self.image_size(pipe, network)
        return self.mu(config, self.image_tokens(network, self.latent_shape(pipe, network, side, side)), steps)
