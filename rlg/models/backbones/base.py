"""What a model family has to say about itself: a frozen record of functions.

The defaults are those of a network that works on the latents of a convolutional autoencoder as they are.
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
    """(C, H, W) of the latents of an image of height x width pixels. Raises ValueError for other sizes."""
    factor = pipe.vae_scale_factor
    if height % factor or width % factor:
        raise ValueError(f"image size {height}x{width} is not a multiple of {factor}")
    return network.config.in_channels, height // factor, width // factor


def image_size(pipe: Any, network: nn.Module) -> int:
    """Side in pixels of the images that the model was trained on."""
    return network.config.sample_size * pipe.vae_scale_factor


def image_tokens(network: nn.Module, latent_shape_CHW: tuple[int, int, int]) -> int:
    """Length of an image in the network's sequence: its latents' area in the network's patches."""
    _, height, width = latent_shape_CHW
    patch = getattr(network.config, "patch_size", None) or 1
    return (height // patch) * (width // patch)


def mu(config: Mapping[str, Any], tokens: int, steps: int) -> float:
    """`process.linear_mu`, at any number of steps."""
    return process.linear_mu(config, tokens)


def decode(pipe: Any, latents_BCHW: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], fp32."""
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    latents = (latents_BCHW / config.scaling_factor + shift).to(pipe.vae.dtype)
    return (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


def encode_image(pipe: Any, images_B3HW: Tensor) -> Tensor:
    """Latents (B, C, H, W), fp32, of images in [0, 1]: the posterior's mean."""
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
    # (pipe, prompts) -> conditioning, of one length whatever the prompts; and t5_length, where there is a T5
    encode: Callable[..., Conditioning]
    forward: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]  # (network, x_BCHW, t_B, cond) -> out_BCHW
    prepare: Callable[[Any], None] = lambda pipe: None  # called once on a pipeline that we load ourselves
    with_sizes: Callable[[Conditioning, Tensor, Tensor, int], Conditioning] = _sizeless  # see `Policy.with_sizes`
    max_t5_length: int = 0  # tokens that its T5 may be given; 0: it has none
    latent_shape: Callable[[Any, nn.Module, int, int], tuple[int, int, int]] = latent_shape  # height, width in pixels
    image_size: Callable[[Any, nn.Module], int] = image_size
    decode: Callable[[Any, Tensor], Tensor] = decode
    encode_image: Callable[[Any, Tensor], Tensor] = encode_image
    image_tokens: Callable[[nn.Module, tuple[int, int, int]], int] = image_tokens  # (network, latents' (C, H, W))
    mu: Callable[[Mapping[str, Any], int, int], float] = mu  # (scheduler config, image tokens, steps), see `process`
    sigmas: Callable[[int], Sequence[float] | None] = lambda steps: None  # that its pipeline gives to its scheduler
    pipeline_cfg: Callable[[float], dict[str, Any]] = _guidance_scale  # options of its pipeline for a scale of CFG

    def denoiser(self, pipe: Any) -> nn.Module:
        """The network of a pipeline."""
        return getattr(pipe, self.denoiser_name)

    def forward_process(self, pipe: Any, config: Mapping[str, Any], side: int | None = None) -> Process:
        """The noising of square images under a scheduler config; None is the model's own side in pixels.

        Raises ValueError as `process.process_from_config`, and for a side that the family has not.
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
        """The denoising of square images under a scheduler config; None is the model's own side in pixels.

        Raises ValueError as `process.make_schedule`, and for a side that the family has not.
        """
        how_far = self._mu(pipe, config, steps, side)
        return process.make_schedule(config, steps, kernel, level, window, mu=how_far, sigmas=self.sigmas(steps))

    def _mu(self, pipe: Any, config: Mapping[str, Any], steps: int, side: int | None) -> float | None:
        """How far the noise levels of an image of this size are shifted; None where a size shifts nothing."""
        if not process.shifts_by_size(config):
            return None
        network = self.denoiser(pipe)
        side = side or self.image_size(pipe, network)
        return self.mu(config, self.image_tokens(network, self.latent_shape(pipe, network, side, side)), steps)
