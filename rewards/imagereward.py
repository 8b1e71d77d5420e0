"""ImageReward-v1.0: BLIP reads prompt and image, a head scores them (arXiv 2304.05977).

    score = (head( text(prompt; vision(image))[CLS] ) - 0.167) / 1.033    head: linear layers 768-1024-128-64-16-1

Weights: ImageReward.pt of THUDM/ImageReward on the hub, converted here to transformers' BLIP (ViT-L/16, and BERT-base
with cross-attention). SOURCE is that file (.pt or .safetensors), or a folder with it and, optionally, the tokenizer of
google-bert/bert-base-uncased. Images: shorter side to 224 by PIL's bicubic, centre crop, CLIP's mean and std. Long
prompts are cut at 35 tokens, as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)

from rewards import DifferentiableReward
from rewards.aesthetic import LinearHead
from rewards.preprocessing import centre_crop, round_half
from rewards.weights import Origin, assemble, batched, half_on_gpu, renamed

HUB = "THUDM/ImageReward"
BERT = "google-bert/bert-base-uncased"
# mean and standard deviation of the raw scores; ImageReward/ImageReward.py, 1.5
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# From BLIP's names of its vision tower to transformers'; those of the text tower are the same.
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)


def configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The configs of the two towers.

    They are ImageReward/models/BLIP/blip.py (large), vit.py, and med_config.json on the hub.
    """
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=30524,  # bert-base-uncased, with [DEC] and [ENC]
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives it cross-attention; it still reads the prompt in both directions
    )
    return vision, text


def towers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights of vision, text (under transformers' names) and head.

    The rest of BLIP is not part of the score.
    """
    vision, text, head = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (_VISION, _TEXT, _HEAD)
    )
    text.pop("embeddings.position_ids", None)  # it is a constant
    return {renamed(name, _RENAMED): tensor for name, tensor in vision.items()}, text, head


@dataclass(frozen=True)
class ImageReward:
    """The two towers, the head, and the tokenizer."""

    vision: BlipVisionModel
    text: BlipTextModel
    head: LinearHead
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], *, rounded: bool = True) -> Tensor:
        """(B,) standardised scores of images in [0, 1].

        rounded: see `rewards.preprocessing`.
        """
        device = self.vision.device
        pixels = centre_crop(images_B3HW, self.vision.config.image_size, round_half, rounded=rounded)
        patches = self.vision(pixels.to(device, self.vision.dtype)).last_hidden_state
        rows = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS)
        ids, mask = (torch.tensor(rows[name], device=device) for name in ("input_ids", "attention_mask"))
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(read[:, 0]) - MEAN) / STD


def imagereward(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `imagereward`; source: the file, or a folder.

    Raises ValueError if something is not there.
    """
    origin = Origin.of("imagereward", source, HUB)
    file = origin.find("ImageReward.pt", "ImageReward.safetensors")
    vision, text, head = towers(origin.tensors(file))
    vision_config, text_config = configs()
    build = partial(assemble, dtype=half_on_gpu(device))
    try:
        parts = (
            build(BlipVisionModel, vision_config, vision).to(device),
            build(BlipTextModel, text_config, text, add_pooling_layer=False).to(device),
            LinearHead(text_config.hidden_size).fill(head).to(device),
        )
    except ValueError as error:
        raise origin.unreadable(str(file), error) from error
    return batched(ImageReward(*parts, origin.tokenizer(BertTokenizer, BERT)), *parts)
