"""HPSv2 and HPSv2.1: CLIP ViT-H/14 tuned on people's choices (arXiv 2306.09341).

    score = cos( image, prompt )

Scores of the two are not comparable. Weights: HPS_v2_compressed.pt and HPS_v2.1_compressed.pt of xswu/HPSv2 on the
hub. They have open_clip's names of its ViT-H-14, and are converted here to transformers' CLIP. SOURCE is that file
(.pt or .safetensors), or a folder with it and, optionally, a tokenizer. As in the hpsv2 package, prompts go through
ftfy, and an image is scaled until its longer side is 224 and padded with black. Unlike for PickScore, nothing is
cropped. The image is antialiased, as in that package since torchvision 0.17; with an older one, as in 2023, it was
not.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from rewards import DifferentiableReward
from rewards.clip import Clip
from rewards.preprocessing import pad_to_square
from rewards.step_aware import CLIP_H, clip_h_config
from rewards.weights import Origin, assemble, batched, half_on_gpu, renamed

HUB = "xswu/HPSv2"
# From open_clip's names to transformers'; the text tower has no prefix there.
_RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies from the right


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip ViT under the names of transformers' CLIPModel."""
    converted: dict[str, Tensor] = {}
    for published, tensor in tensors.items():
        name = renamed(published, _RENAMED)
        if ".in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{part}_proj.")] = third
        else:
            converted[name] = tensor.T if published in _TRANSPOSED else tensor
    return converted


def _reward(name: str, stem: str, device: torch.device | str, source: str | None) -> DifferentiableReward:
    import ftfy

    origin = Origin.of(name, source, HUB)
    file = origin.find(f"{stem}.pt", f"{stem}.safetensors")
    try:
        model = assemble(CLIPModel, clip_h_config(), from_open_clip(origin.tensors(file)), half_on_gpu(device))
    except ValueError as error:
        raise origin.unreadable(str(file), error) from error
    clip = Clip(model.to(device), origin.tokenizer(CLIPTokenizer, CLIP_H), pad_to_square)

    def score(images_B3HW: Tensor, prompts: Sequence[str], *, rounded: bool) -> Tensor:
        clean = [html.unescape(html.unescape(ftfy.fix_text(prompt))) for prompt in prompts]
        return clip.cosine(images_B3HW, clean, rounded=rounded)

    return batched(score, clip.model)


def v2_1(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `hpsv2`; source: the weights' file, or a folder. Raises ValueError if something is not there."""
    return _reward("hpsv2", "HPS_v2.1_compressed", device, source)


def v2_0(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `hpsv2_v2.0`; source: the weights' file, or a folder. Raises ValueError if something is not there."""
    return _reward("hpsv2_v2.0", "HPS_v2_compressed", device, source)
