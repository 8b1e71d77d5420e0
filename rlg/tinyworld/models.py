"""The tinyworld's networks: ordinary diffusers pipelines, small enough to train and run on two CPU cores."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from rewards.blobs import PALETTE, SHAPES, SIGN
from rlg.tinyworld.scenes import COUNTS, RELATIONS, plural

FAMILIES = ("sd", "sdxl", "sd3")
MAX_TOKENS = 12  # the longest caption of the tinyworld, start and end included
_TEXT_WIDTH = 64
_LATENT_SIZE = 8


def words() -> list[str]:
    """The vocabulary of the captions; every word is one token. In this order no merge cuts another word in two."""
    relations = {word for relation in RELATIONS for word in relation.split()}
    function_words = {"a", "and", "that", "says", "photo", *relations}
    shapes = [*map(plural, SHAPES), *SHAPES, SIGN]
    return ["green", "three", *shapes, *PALETTE, *COUNTS.values(), *sorted(function_words)]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell the tinyworld's words; other words fall into characters."""
    characters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges: dict[tuple[str, str], None] = {}
    pieces = [*characters, *(c + "</w>" for c in characters)]
    for word in words():
        left = word[0]
        for place, char in enumerate(word[1:], start=2):
            right = char + ("</w>" if place == len(word) else "")
            merges[(left, right)] = None
            left += right
            pieces.append(left)
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary))
        merges_file.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=4 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tie_word_ends(model: torch.nn.Module, tokenizer: CLIPTokenizer) -> None:
    """Start a character, and the same at the end of a word, from one embedding: a sign's spelling needs both."""
    table = model.get_input_embeddings().weight.data
    table.mul_(15)  # unit-size embeddings: at CLIP's 0.02 the words are slow to come apart
    vocabulary = tokenizer.get_vocab()
    for piece, index in vocabulary.items():
        if len(piece) == 1 and piece + "</w>" in vocabulary:
            table[vocabulary[piece + "</w>"]] = table[index]


def _no_t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A third text encoder without layers, whose output is zero: what diffusers puts in place of an absent one.

    diffusers can't load a folder without a third encoder unless each caller passes `text_encoder_3=None`; this stub
    lets the plain call work, with the same result.
    """
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0)], extra_ids=0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=1, d_ff=1, num_layers=0, num_heads=1)
    )
    for parameter in encoder.parameters():
        parameter.data.zero_()
    return encoder, tokenizer


def build_vae(channels: int) -> AutoencoderKL:
    """An 8x autoencoder for 64x64 images: latents (channels, 8, 8)."""
    widths = (16, 32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        shift_factor=0.0 if channels == 16 else None,
    )


def _vp_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _unet(**extra: object) -> UNet2DConditionModel:
    widths = (64, 128)
    return UNet2DConditionModel(
        sample_size=_LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=tuple(w // 32 for w in widths),  # diffusers' historical name for the number of heads
        norm_num_groups=16,
        **extra,
    )


def build(family: str) -> DiffusionPipeline:
    """A randomly initialised pipeline of a family ("sd", "sdxl", "sd3"); seed torch first. Raises ValueError."""
    tokenizer = build_tokenizer()
    if family == "sd":
        encoder = CLIPTextModel(_text_config(tokenizer, 2))
        _tie_word_ends(encoder, tokenizer)
        return StableDiffusionPipeline(
            vae=build_vae(4),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=_unet(cross_attention_dim=_TEXT_WIDTH),
            scheduler=_vp_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    second = CLIPTextModelWithProjection(_text_config(tokenizer, 3))
    if family == "sdxl":
        first: torch.nn.Module = CLIPTextModel(_text_config(tokenizer, 3))
        unet = _unet(
            cross_attention_dim=2 * _TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + _TEXT_WIDTH,
        )
        return StableDiffusionXLPipeline(
            build_vae(4), first, second, tokenizer, tokenizer, unet, _vp_scheduler(), add_watermarker=False
        )
    first = CLIPTextModelWithProjection(_text_config(tokenizer, 3))
    for encoder in (first, second):
        _tie_word_ends(encoder, tokenizer)
    transformer = SD3Transformer2DModel(
        sample_size=_LATENT_SIZE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=_LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    third, tokenizer_3 = _no_t5(2 * _TEXT_WIDTH)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(16),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in half precision that plain `from_pretrained` loads in float32, whole.

    diffusers' models load in float32 unless told otherwise, transformers' in the precision that their config names.
    """
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder)
    for file in folder.glob("text_encoder*/config.json"):
        row = json.loads(file.read_text())
        file.write_text(json.dumps(row | {"dtype": "float32"}, indent=2) + "\n")
