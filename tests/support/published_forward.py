"""The forward passes of open_clip and BLIP, written out on tensors under their published names, with 2 heads each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tests.support.published import BLIP_TINY, PATCH, TINY

Weights = dict[str, Tensor]


def below(weights: Weights, prefix: str) -> Weights:
    """The tensors of a part."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, L, width) by (B, M, width); mask: true where a query may look, broadcast to (B, heads, L, M)."""
    query, key, value = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return (logits.softmax(dim=3) @ value).transpose(1, 2).flatten(2)


def _open_clip_blocks(w: Weights, x: Tensor, layers: int, mask: Tensor | None) -> Tensor:
    """hpsv2/src/open_clip/transformer.py: ResidualAttentionBlock."""
    for index in range(layers):
        block = below(w, f"transformer.resblocks.{index}.")
        hidden = norm(block, "ln_1", x, 1e-5)
        qkv = functional.linear(hidden, block["attn.in_proj_weight"], block["attn.in_proj_bias"]).chunk(3, dim=2)
        x = x + linear(block, "attn.out_proj", attention(*qkv, mask))
        hidden = functional.gelu(linear(block, "mlp.c_fc", norm(block, "ln_2", x, 1e-5)))
        x = x + linear(block, "mlp.c_proj", hidden)
    return x


def open_clip_cosine(w: Weights, squares_B3SS: Tensor, ids_BL: Tensor) -> Tensor:
    """(B,); hpsv2/src/open_clip/model.py: CLIP."""
    visual = below(w, "visual.")
    x = functional.conv2d(squares_B3SS, visual["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([visual["class_embedding"].expand(len(x), 1, -1), x], dim=1) + visual["positional_embedding"]
    x = _open_clip_blocks(visual, norm(visual, "ln_pre", x, 1e-5), TINY.layers, None)
    image = norm(visual, "ln_post", x[:, 0], 1e-5) @ visual["proj"]
    y = w["token_embedding.weight"][ids_BL] + w["positional_embedding"]
    y = _open_clip_blocks(w, y, TINY.text_layers, torch.ones(TINY.length, TINY.length).tril().bool())
    text = norm(w, "ln_final", y, 1e-5)[torch.arange(len(ids_BL)), ids_BL.argmax(dim=1)] @ w["text_projection"]
    return functional.cosine_similarity(image, text, dim=1)


def blip_vision(w: Weights, squares_B3SS: Tensor) -> Tensor:
    """(B, 1 + patches, width); ImageReward/models/BLIP/vit.py."""
    patches = functional.conv2d(squares_B3SS, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], PATCH)
    x = torch.cat([w["cls_token"].expand(len(patches), 1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + w["pos_embed"]
    for index in range(BLIP_TINY.layers):
        block = below(w, f"blocks.{index}.")
        qkv = linear(block, "attn.qkv", norm(block, "norm1", x, 1e-6)).chunk(3, dim=2)
        x = x + linear(block, "attn.proj", attention(*qkv))
        hidden = functional.gelu(linear(block, "mlp.fc1", norm(block, "norm2", x, 1e-6)))
        x = x + linear(block, "mlp.fc2", hidden)
    return norm(w, "norm", x, 1e-6)


def _bert_attention(w: Weights, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """ImageReward/models/BLIP/med.py: BertAttention."""
    query, key, value = (linear(w, f"self.{n}", y) for n, y in (("query", x), ("key", source), ("value", source)))
    return norm(w, "output.LayerNorm", x + linear(w, "output.dense", attention(query, key, value, mask)), 1e-12)


def blip_text(w: Weights, ids_BL: Tensor, mask_BL: Tensor, patches_BNC: Tensor) -> Tensor:
    """(B, width), the states of [CLS]; ImageReward/models/BLIP/med.py: BertModel."""
    x = w["embeddings.word_embeddings.weight"][ids_BL]
    x = x + w["embeddings.position_embeddings.weight"][: ids_BL.shape[1]]
    x = norm(w, "embeddings.LayerNorm", x, 1e-12)
    for index in range(BLIP_TINY.text_layers):
        layer = below(w, f"encoder.layer.{index}.")
        x = _bert_attention(below(layer, "attention."), x, x, mask_BL[:, None, None])
        x = _bert_attention(below(layer, "crossattention."), x, patches_BNC, None)
        hidden = functional.gelu(linear(layer, "intermediate.dense", x))
        x = norm(layer, "output.LayerNorm", x + linear(layer, "output.dense", hidden), 1e-12)
    return x[:, 0]


def head(w: Weights, features_BD: Tensor) -> Tensor:
    """(B,); the layers of the aesthetic predictor and of ImageReward."""
    for place in (0, 2, 4, 6, 7):
        features_BD = linear(w, f"layers.{place}", features_BD)
    return features_BD[:, 0]
