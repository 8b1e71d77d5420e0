"""Networks of the tinyworld: diffusers pipelines for two CPU cores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

from rlg.tinyworld.worlds import SHAPES, World

_LATENT_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the networks of a world are."""

    vae_widths: tuple[int, ...]
    sd_channels: int  # of the latents of the UNets' autoencoder; the transformer's has 16
    text_width: int
    unet_widths: tuple[int, int]


SIZES = {
    "shapes": Sizes(vae_widths=(16, 32, 64, 64), sd_channels=4, text_width=64, unet_widths=(64, 128)),
    "emoji": Sizes(vae_widths=(16, 32, 64, 96), sd_channels=16, text_width=64, unet_widths=(80, 160)),
}


def build_tokenizer(world: World = SHAPES) -> CLIPTokenizer:
    """Build a CLIP tokenizer with a token for each known word.

    Other words fall into characters.
    """
    characters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges = list(dict.fromkeys(pair for word in world.words for pair in _merges(word, world.merge_from_end)))
    pieces = [*characters, *(c + "</w>" for c in characters), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary))
        merges_file.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=world.max_tokens)
    return tokenizer


def _merges(word: str, from_end: bool) -> Iterator[tuple[str, str]]:
    """Merges that make a word of its characters, one at a time.

    from_end: they begin at the word's end.
    """
    pieces = [*word[:-1], word[-1] + "</w>"]
    for place in range(1, len(pieces)):
        if from_end:
            yield pieces[-place - 1], "".join(pieces[-place:])
        else:
            yield "".join(pieces[:place]), pieces[place]


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tie_word_ends(model: torch.nn.Module, tokenizer: CLIPTokenizer) -> None:
    """Give a character one embedding, inside a word and at its end.

    The spelling of signs needs both.
    """
    table = model.get_input_embeddings().weight.data
    table.mul_(15)  # unit-size embeddings: at CLIP's 0.02 the words are slow to come apart
    vocabulary = tokenizer.get_vocab()
    for piece, index in vocabulary.items():
        if len(piece) == 1 and piece + "</w>" in vocabulary:
            table[vocabulary[piece + "</w>"]] = table[index]


def _no_t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Build a third text encoder without layers, whose output is zero.

    Diffusers puts zeros in place of an absent encoder.

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


def build_vae(channels: int, widths: Sequence[int], shifted: bool) -> AutoencoderKL:
    """Build an 8x autoencoder for 64x64 images, with latents (channels, 8, 8).

    shifted: the mean of the latents is taken off.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        shift_factor=0.0 if shifted else None,
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


def _unet(sizes: Sizes, **extra: object) -> UNet2DConditionModel:
    widths = sizes.unet_widths
    return UNet2DConditionModel(
        sample_size=_LATENT_SIZE,
        in_channels=sizes.sd_channels,
        out_channels=sizes.sd_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=tuple(w // 32 for w in widths),  # diffusers' historical name for the number of heads
        norm_num_groups=16,
        **extra,
    )


def _sd(world: World) -> DiffusionPipeline:
    sizes, tokenizer = SIZES[world.name], build_tokenizer(world)
    encoder = CLIPTextModel(_text_config(tokenizer, sizes.text_width, 2))
    _tie_word_ends(encoder, tokenizer)
    return StableDiffusionPipeline(
        vae=build_vae(sizes.sd_channels, sizes.vae_widths, shifted=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=_unet(sizes, cross_attention_dim=sizes.text_width),
        scheduler=_vp_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(world: World) -> DiffusionPipeline:
    sizes, tokenizer = SIZES[world.name], build_tokenizer(world)
    second = CLIPTextModelWithProjection(_text_config(tokenizer, sizes.text_width, 3))
    first = CLIPTextModel(_text_config(tokenizer, sizes.text_width, 3))
    unet = _unet(
        sizes,
        cross_attention_dim=2 * sizes.text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + sizes.text_width,
    )
    vae = build_vae(sizes.sd_channels, sizes.vae_widths, shifted=False)
    return StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, _vp_scheduler(), add_watermarker=False
    )


def _sd3(world: World) -> DiffusionPipeline:
    sizes, tokenizer = SIZES[world.name], build_tokenizer(world)
    config = _text_config(tokenizer, sizes.text_width, 3)
    second, first = (CLIPTextModelWithProjection(config) for _ in range(2))
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
        joint_attention_dim=2 * sizes.text_width,
        caption_projection_dim=192,
        pooled_projection_dim=2 * sizes.text_width,
        pos_embed_max_size=_LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    third, tokenizer_3 = _no_t5(2 * sizes.text_width)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(16, sizes.vae_widths, shifted=True),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


# Randomly initialised pipelines by family, for the pretraining and for tests.
_BUILDERS = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3}
FAMILIES = tuple(_BUILDERS)


def build(family: str, world: World = SHAPES) -> DiffusionPipeline:
    """Build a random pipeline of a family ("sd", "sdxl", "sd3").

    Seed torch first. Raises ValueError for an unknown family.
    """
    if family not in _BUILDERS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    return _BUILDERS[family](world)


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in half precision; `from_pretrained` loads it in float32, whole.

    diffusers' models load in float32 unless told otherwise, transformers' in the precision that their config names.
    """
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder)
    for file in folder.glob("text_encoder*/config.json"):
        row = json.loads(file.read_text())
        file.write_text(json.dumps(row | {"dtype": "float32"}, indent=2) + "\n")
