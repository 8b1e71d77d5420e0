"""Tiny checkpoints in the layout of the published rewards: names and shapes of tensors, tokenizers, files."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

Shapes = dict[str, tuple[int, ...]]
SIDE, PATCH = 28, 14
BERT_WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "two", "red", "blue", "green", "circle", "circles", "cross", "square", "##s", "of", "and", "'"),
)


@dataclass(frozen=True)
class Sizes:
    """Of a vision tower and of a text tower."""

    width: int
    layers: int
    text_width: int
    text_layers: int
    vocabulary: int
    length: int
    patches: int
    patch: int = PATCH
    mlp: int = 4  # the hidden layer of MLPs, in widths


TINY = Sizes(32, 2, 48, 2, 60, 16, (SIDE // PATCH) ** 2)
VIT_H = Sizes(1280, 32, 1024, 24, 49408, 77, 256)  # hpsv2/src/open_clip/model_configs/ViT-H-14.json
BLIP_L = Sizes(1024, 24, 768, 12, 30524, 512, 196, patch=16)  # ImageReward/models/BLIP, med_config.json
BLIP_TINY = Sizes(32, 2, 48, 2, len(BERT_WORDS), 40, (SIDE // PATCH) ** 2)
EMBEDDING = 24  # of tiny CLIPs
CLIPS = ("pickscore", "clipscore")
HPS = {"hpsv2": "HPS_v2.1_compressed.pt", "hpsv2_v2.0": "HPS_v2_compressed.pt"}
REWARDS = (*CLIPS, *HPS, "imagereward", "aesthetic")


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _open_clip_blocks(prefix: str, width: int, layers: int, mlp: int) -> Shapes:
    shapes: Shapes = {}
    for index in range(layers):
        block = f"{prefix}transformer.resblocks.{index}"
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _linear(f"{block}.mlp.c_fc", mlp * width, width) | _linear(f"{block}.mlp.c_proj", width, mlp * width)
    return shapes


def open_clip_shapes(sizes: Sizes, embedding: int) -> Shapes:
    """open_clip's CLIP, as in the state dict of HPSv2."""
    width, text = sizes.width, sizes.text_width
    shapes: Shapes = {
        "positional_embedding": (sizes.length, text),
        "text_projection": (text, embedding),
        "logit_scale": (),
        "token_embedding.weight": (sizes.vocabulary, text),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (sizes.patches + 1, width),
        "visual.proj": (width, embedding),
        "visual.conv1.weight": (width, 3, sizes.patch, sizes.patch),
    }
    shapes |= _norm("visual.ln_pre", width) | _norm("visual.ln_post", width) | _norm("ln_final", text)
    shapes |= _open_clip_blocks("visual.", width, sizes.layers, sizes.mlp)
    return shapes | _open_clip_blocks("", text, sizes.text_layers, sizes.mlp)


def head_shapes(width: int) -> Shapes:
    """The aesthetic predictor's layers; ImageReward has them under "mlp."."""
    widths = (width, 1024, 128, 64, 16, 1)
    rows = (_linear(f"layers.{place}", widths[i + 1], widths[i]) for i, place in enumerate((0, 2, 4, 6, 7)))
    return {name: shape for row in rows for name, shape in row.items()}


def _blip_vision_shapes(sizes: Sizes) -> Shapes:
    width = sizes.width
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, sizes.patches + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, sizes.patch, sizes.patch), "patch_embed.proj.bias": (width,)}
    for index in range(sizes.layers):
        block = f"blocks.{index}"
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", sizes.mlp * width, width)
        shapes |= _linear(f"{block}.mlp.fc2", width, sizes.mlp * width)
    return shapes | _norm("norm", width)


def _blip_text_shapes(sizes: Sizes) -> Shapes:
    width = sizes.text_width
    shapes: Shapes = {
        "embeddings.position_ids": (1, sizes.length),
        "embeddings.word_embeddings.weight": (sizes.vocabulary, width),
        "embeddings.position_embeddings.weight": (sizes.length, width),
    }
    shapes |= _norm("embeddings.LayerNorm", width)
    for index in range(sizes.text_layers):
        layer = f"encoder.layer.{index}"
        for kind, source in (("attention", width), ("crossattention", sizes.width)):
            shapes |= _linear(f"{layer}.{kind}.self.query", width, width)
            shapes |= _linear(f"{layer}.{kind}.self.key", width, source)
            shapes |= _linear(f"{layer}.{kind}.self.value", width, source)
            shapes |= _linear(f"{layer}.{kind}.output.dense", width, width)
            shapes |= _norm(f"{layer}.{kind}.output.LayerNorm", width)
        shapes |= _linear(f"{layer}.intermediate.dense", sizes.mlp * width, width)
        shapes |= _linear(f"{layer}.output.dense", width, sizes.mlp * width)
        shapes |= _norm(f"{layer}.output.LayerNorm", width)
    return shapes


def imagereward_shapes(sizes: Sizes) -> Shapes:
    """The state dict of the image-reward package."""
    parts = {
        "blip.visual_encoder.": _blip_vision_shapes(sizes),
        "blip.text_encoder.": _blip_text_shapes(sizes),
        "blip.": _linear("vision_proj", 256, sizes.width) | _linear("text_proj", 256, sizes.text_width),
        "mlp.": head_shapes(sizes.text_width),
    }
    return {prefix + name: shape for prefix, shapes in parts.items() for name, shape in shapes.items()}


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Of a size at which every tensor counts: norms about 1, matrices that keep lengths."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[1]).expand(shape).clone()
        elif len(shape) > 1:
            tensors[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            tensors[name] = 0.2 * noise + (1 if name.endswith("weight") else 0)
    return tensors


def tiny_clip_config() -> CLIPConfig:
    """A CLIP of the sizes of `TINY` with 2 heads in each tower and plain GELU."""
    towers = {"num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": EMBEDDING}
    vision = {"hidden_size": TINY.width, "intermediate_size": 4 * TINY.width, "num_hidden_layers": TINY.layers}
    text = {"hidden_size": TINY.text_width, "intermediate_size": 4 * TINY.text_width}
    text |= {"num_hidden_layers": TINY.text_layers, "vocab_size": TINY.vocabulary}
    text |= {"max_position_embeddings": TINY.length, "bos_token_id": TINY.vocabulary - 2}
    text |= {"eos_token_id": TINY.vocabulary - 1, "pad_token_id": TINY.vocabulary - 1}
    return CLIPConfig(
        text_config=towers | text,
        vision_config=towers | vision | {"image_size": SIDE, "patch_size": PATCH},
        projection_dim=EMBEDDING,
    )


def tiny_blip_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """ImageReward's towers in the sizes of `BLIP_TINY`, with 2 heads each."""
    sizes, heads = BLIP_TINY, {"num_attention_heads": 2}
    vision = {"hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_hidden_layers": sizes.layers}
    text = {"hidden_size": sizes.text_width, "intermediate_size": 4 * sizes.text_width}
    text |= {"num_hidden_layers": sizes.text_layers, "vocab_size": sizes.vocabulary}
    text |= {"max_position_embeddings": sizes.length, "encoder_hidden_size": sizes.width, "is_decoder": True}
    return (
        BlipVisionConfig(**heads, **vision, image_size=SIDE, patch_size=PATCH, layer_norm_eps=1e-6),
        BlipTextConfig(**heads, **text, layer_norm_eps=1e-12),
    )


def write_clip_tokenizer(folder: Path) -> None:
    """A byte-pair vocabulary of letters, alone and at a word's end, and two merges; as CLIP's, the end is the last."""
    letters = [*string.ascii_lowercase, "'"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>"]
    tokens += [f"unused{i}" for i in range(TINY.vocabulary - 2 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")


def write_bert_tokenizer(folder: Path) -> None:
    """A WordPiece vocabulary of a few words."""
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS))


def write_clip(folder: Path) -> CLIPModel:
    """A random CLIP as on the hub: config.json, model.safetensors and tokenizer; returned, too."""
    model = CLIPModel(tiny_clip_config()).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(random_tensors(shapes) | {"logit_scale": torch.tensor(4.6)})
    model.save_pretrained(folder)
    write_clip_tokenizer(folder)
    return model


def write_rewards(root: Path) -> dict[str, Path]:
    """A folder for each of `REWARDS`, with everything that the reward reads; by name."""
    folders = {name: root / name for name in REWARDS}
    for folder in folders.values():
        folder.mkdir()
    for name in (*CLIPS, "aesthetic"):
        write_clip(folders[name])
    torch.save(random_tensors(head_shapes(EMBEDDING)), folders["aesthetic"] / "sac+logos+ava1-l14-linearMSE.pth")
    for name, file in HPS.items():
        weights = random_tensors(open_clip_shapes(TINY, EMBEDDING))
        torch.save({"state_dict": weights, "epoch": 1}, folders[name] / file)
        write_clip_tokenizer(folders[name])
    torch.save(random_tensors(imagereward_shapes(BLIP_TINY)), folders["imagereward"] / "ImageReward.pt")
    write_bert_tokenizer(folders["imagereward"])
    return folders


def tiny_mask2former_config(classes: int) -> Mask2FormerConfig:
    """A Mask2Former with Swin, of 9 queries and the least widths that its normalisation allows."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32}
    return Mask2FormerConfig(
        backbone_config=SwinConfig(**swin, out_features=stages),
        **widths,
        **layers,
        num_queries=9,
        num_labels=classes,
    )


def write_mask2former(folder: Path, classes: int = 80) -> Mask2FormerForUniversalSegmentation:
    """A random Mask2Former as on the hub: config.json and model.safetensors; returned, too. Its classes are sure."""
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(tiny_mask2former_config(classes)).eval()
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=2.0)
    model.save_pretrained(folder)
    return model
