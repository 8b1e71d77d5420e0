"""Stable Diffusion 3 / 3.5: a joint transformer over image and text tokens, trained by flow matching.

Without its T5 encoder, diffusers fills the text sequence with 256 zero vectors. They carry no position, so they stay
equal to one another through the whole network, and 256 equal keys act in a softmax as one key whose logit is higher by
log 256. `encode` then passes a single zero vector with its count, and the attention adds that bias: the same function
(to rounding) for a fraction of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rlg.backbones.base import Backbone, Conditioning

T5_TOKENS = 256  # the pipeline's default `max_sequence_length`
_LORA_TARGETS = tuple(  # Flow-GRPO, scripts/train_sd3.py
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
)


class CollapsedTokenProcessor:
    """diffusers' joint attention, in which the last text token can stand for `last_token_count` equal ones."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        last_token_count: int = 1,
    ) -> Any:
        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        x, text = hidden_states, encoder_hidden_states
        qkv = [heads(attn.to_q(x), attn.norm_q), heads(attn.to_k(x), attn.norm_k), heads(attn.to_v(x))]
        bias = None
        if text is not None:
            added = [
                heads(attn.add_q_proj(text), attn.norm_added_q),
                heads(attn.add_k_proj(text), attn.norm_added_k),
                heads(attn.add_v_proj(text)),
            ]
            qkv = [torch.cat(pair, dim=2) for pair in zip(qkv, added, strict=True)]
            if last_token_count > 1:
                bias = torch.zeros(qkv[1].shape[2], dtype=qkv[0].dtype, device=x.device)
                bias[-1] = math.log(last_token_count)
                bias = bias.expand(1, 1, len(bias), len(bias))
        y = scaled_dot_product_attention(*qkv, attn_mask=bias).transpose(1, 2).flatten(2).to(qkv[0].dtype)
        if text is None:
            return attn.to_out[0](y)
        image, text = y[:, : x.shape[1]], y[:, x.shape[1] :]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def prepare(pipe: Any) -> None:
    """Let the network take collapsed tokens. Harmless to a caller who passes them all."""
    if pipe.text_encoder_3 is not None and pipe.text_encoder_3.config.num_layers == 0:
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)  # the tinyworld's stand-in, which outputs zeros
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(CollapsedTokenProcessor())


def encode(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """Hidden states of all text encoders in one sequence, and the pooled CLIP embeddings."""
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    collapse = pipe.text_encoder_3 is None and isinstance(processor, CollapsedTokenProcessor)
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(prompts),
        None,
        None,
        device=pipe.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=1 if collapse else T5_TOKENS,
    )
    count = torch.full((len(pooled),), T5_TOKENS if collapse else 1)
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled, "last_token_count": count})


def forward(network: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    """One evaluation of the network."""
    embeds, pooled = cond.tensors["encoder_hidden_states"], cond.tensors["pooled_projections"]
    count = int(cond.tensors["last_token_count"][0])
    extra = {"joint_attention_kwargs": {"last_token_count": count}} if count > 1 else {}
    x = x_BCHW.to(embeds.dtype)
    return network(x, embeds, pooled, t_B, return_dict=False, **extra)[0]


BACKBONE = Backbone("transformer", ("text_encoder", "text_encoder_2"), _LORA_TARGETS, encode, forward, prepare)
