"""Stable Diffusion 3 / 3.5: a joint transformer, trained by flow matching.

Image and text tokens attend to each other. Without its T5 encoder, diffusers fills the text sequence with n = 256 zero
vectors. These have no position, so they stay equal through the whole network. In a softmax, n equal keys act as one
key whose logit is higher by log n. `encode` therefore passes one zero vector and the count, and the attention adds log
n. The function is the same up to rounding, with far fewer tokens.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rlg.diffusion.conditioning import Conditioning
from rlg.models.backbones.base import Backbone

T5_TOKENS = 256  # the pipeline's default `max_sequence_length`
_MAX_T5_TOKENS = 512  # the pipeline refuses more
_LORA_TARGETS = tuple(  # source: Flow-GRPO, scripts/train_sd3.py
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
)


class CollapsedTokenProcessor:
    """Diffusers' joint attention, with collapsed text tokens.

    The last text token can stand for `last_token_count` equal ones.
    """

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


def equal_zero_tokens(embeds_BLD: Tensor) -> int:
    """Number of tokens that are zero at a text sequence's end.

    A token counts if it is zero for every prompt of the batch.
    """
    zero_L = (embeds_BLD == 0).flatten(2).all(dim=2).all(dim=0)
    return int(zero_L.flip(0).long().cumprod(dim=0).sum())


@contextmanager
def collapsed(network: nn.Module, inputs: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Inputs in which one token stands for the last `count` ones.

    inputs: the network's keyword arguments. Inside the context, the network has attention processors that take the
    shorter inputs. Its own ones come back at the end.
    """
    embeds = inputs["encoder_hidden_states"]
    options = {**(inputs.get("joint_attention_kwargs") or {}), "last_token_count": count}
    attentions = [block.attn for block in network.transformer_blocks]
    before = [attention.processor for attention in attentions]
    for attention in attentions:
        attention.processor = CollapsedTokenProcessor()
    try:
        fewer = {"encoder_hidden_states": embeds[:, : embeds.shape[1] - count + 1], "joint_attention_kwargs": options}
        yield {**inputs, **fewer}
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor


def takes_collapsed(network: nn.Module) -> bool:
    """Tell whether `collapsed` works for a network.

    All of its attention must be diffusers' plain one.
    """
    processors = [block.attn.processor for block in network.transformer_blocks]
    return all(type(p) is JointAttnProcessor2_0 and getattr(p, "_attention_backend", None) is None for p in processors)


class FewerTokens:
    """Inputs with one token for all of T5's equal zero tokens.

    They are for a network that another pipeline calls. A pipeline passes the same tensor at every step, so its tokens
    are counted once.
    """

    def __init__(self) -> None:
        self._counted: tuple[weakref.ref[Tensor], int] | None = None

    @contextmanager
    def __call__(self, network: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The shorter inputs, or the same ones where nothing may go."""
        embeds = inputs.get("encoder_hidden_states")
        count = self._count(embeds) if isinstance(embeds, Tensor) else 0
        if count < 2 or not takes_collapsed(network):
            yield inputs
            return
        with collapsed(network, inputs, count) as fewer:
            yield fewer

    def _count(self, embeds_BLD: Tensor) -> int:
        if self._counted is None or self._counted[0]() is not embeds_BLD:
            self._counted = weakref.ref(embeds_BLD), equal_zero_tokens(embeds_BLD)
        return self._counted[1]


def prepare(pipe: Any) -> None:
    """Let the network take collapsed tokens.

    A caller may still pass all tokens.
    """
    if pipe.text_encoder_3 is not None and pipe.text_encoder_3.config.num_layers == 0:
        # The tinyworld's T5 has no layers and outputs zeros, so it is left out.
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(CollapsedTokenProcessor())


def encode(pipe: Any, prompts: Sequence[str], t5_length: int = T5_TOKENS) -> Conditioning:
    """Hidden states of all text encoders, and the pooled CLIP embeddings.

    The hidden states are one sequence, in which T5 has `t5_length` tokens.
    """
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    collapse = pipe.text_encoder_3 is None and isinstance(processor, CollapsedTokenProcessor)
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(prompts),
        None,
        None,
        device=pipe.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=1 if collapse else t5_length,
    )
    count = torch.full((len(pooled),), t5_length if collapse else 1)
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled, "last_token_count": count})


def forward(network: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    """One evaluation of the network."""
    embeds, pooled = cond.tensors["encoder_hidden_states"], cond.tensors["pooled_projections"]
    count = int(cond.tensors["last_token_count"][0])
    extra = {"joint_attention_kwargs": {"last_token_count": count}} if count > 1 else {}
    x = x_BCHW.to(embeds.dtype)
    return network(x, embeds, pooled, t_B, return_dict=False, **extra)[0]


BACKBONE = Backbone(
    "transformer",
    ("text_encoder", "text_encoder_2"),
    _LORA_TARGETS,
    encode,
    forward,
    prepare,
    max_t5_length=_MAX_T5_TOKENS,
)
