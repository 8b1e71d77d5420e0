"""CLIP as a reward: PickScore (arXiv 2305.01569) and CLIPScore.

Other rewards are built on the same CLIP.

    pickscore = exp(logit_scale) cos( image, prompt )    clipscore = cos( image, prompt )

The models are yuvalkirstain/PickScore_v1 and openai/clip-vit-large-patch14, or a folder or hub id in their layout
(config.json and safetensors). Images are prepared as by transformers' CLIP processor: shorter side to 224 by PIL's
bicubic, centre crop, CLIP's mean and std. Long prompts are cut at 77 tokens. PickScore is in fp32, as published, on
any device. Flow-GRPO divides it by 26; a weight of 1/26 gives that scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from rewards import DifferentiableReward
from rewards.preprocessing import at_least_fp32, centre_crop
from rewards.step_aware import CLIP_H
from rewards.weights import Origin, batched, half_on_gpu, pretrained

PICKSCORE = "yuvalkirstain/PickScore_v1"  # source of the tokenizer of CLIP_H
CLIP_L = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Clip:
    """transformers' CLIP, with tokenizer and preparation of images."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase | None = None  # None: prompts are not read
    prepare: Callable[..., Tensor] = centre_crop  # (images in [0, 1], side, rounded=) -> normalised squares

    def image_features(self, images_B3HW: Tensor, *, rounded: bool = True) -> Tensor:
        """(B, D) features of images in [0, 1], of length 1, fp32.

        rounded: see `rewards.preprocessing`.
        """
        pixels = self.prepare(images_B3HW, self.model.config.vision_config.image_size, rounded=rounded)
        pooled = self.model.vision_model(pixels.to(self.model.device, self.model.dtype)).pooler_output
        return normalize(at_least_fp32(self.model.visual_projection(pooled)), dim=1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) features of texts, of length 1 and in fp32."""
        assert self.tokenizer is not None, "a CLIP that is to read prompts needs its tokenizer"
        length = self.model.config.text_config.max_position_embeddings
        rows = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        pooled = self.model.text_model(torch.tensor(rows["input_ids"], device=self.model.device)).pooler_output
        return normalize(at_least_fp32(self.model.text_projection(pooled)), dim=1)

    def cosine(self, images_B3HW: Tensor, prompts: Sequence[str], *, rounded: bool = True) -> Tensor:
        """(B,) cosines of each image with its own prompt."""
        return (self.image_features(images_B3HW, rounded=rounded) * self.text_features(prompts)).sum(dim=1)


def read(origin: Origin, device: torch.device | str, dtype: torch.dtype) -> CLIPModel:
    """A frozen CLIP from a folder or the hub.

    Raises ValueError if it is not there, or is no CLIP in safetensors.
    """
    return pretrained(CLIPModel, "CLIP", origin, device, dtype)


def pickscore(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `pickscore`; source: a folder or hub id. Raises ValueError if it is not there."""
    origin = Origin.of("pickscore", source, PICKSCORE)
    clip = Clip(read(origin, device, torch.float32), origin.tokenizer(CLIPTokenizer, CLIP_H))

    def score(images_B3HW: Tensor, prompts: Sequence[str], *, rounded: bool) -> Tensor:
        return clip.model.logit_scale.exp() * clip.cosine(images_B3HW, prompts, rounded=rounded)

    return batched(score, clip.model)


def clipscore(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `clipscore`; source: a folder or hub id. Raises ValueError if it is not there."""
    origin = Origin.of("clipscore", source, CLIP_L)
    clip = Clip(read(origin, device, half_on_gpu(device)), origin.tokenizer(CLIPTokenizer, CLIP_L))
    return batched(clip.cosine, clip.model)
