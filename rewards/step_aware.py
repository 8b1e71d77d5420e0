"""SPO's step-aware preference model: CLIP with a time (arXiv 2406.04314).

    score(image, prompt, t) = exp(logit_scale) cos( vision(image; t), text(prompt) )

Images are estimates of x0 at the diffusion network's time t, which says how noisy their origin was; 0 is a finished
image. t is embedded (sinusoids, two layers) and modulates each layer of the vision tower as in DiT (arXiv 2212.09748):
a shift, a scale and a gate around attention and around the MLP, and a shift and a scale of the pooled output. A new
model has gates 1 and the rest 0, so that it equals the CLIP that it was made from, at all times.

Names and shapes of the parameters are those of the released weights, SPO-Diffusion-Models/Step-Aware_Preference_Models
on the hub, which start from PickScore (CLIP ViT-H/14) and are pickles. Convert one if you trust its source:

    python -c "import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], weights_only=True); \
        s.save_file({k: v.contiguous() for k, v in d.items()}, sys.argv[2])" sd-v1-5_....bin spm_sd15.safetensors

Our own models are folders: config.json, model.safetensors and the tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from rewards.preprocessing import CLIP_MEAN, CLIP_STD
from rewards.weights import difference

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the released weights have its size, tokenizer and preprocessing
_MOST_LAYERS = 1000  # layers of a tower: each takes milliseconds to set up, before any weight is read
_FREQUENCIES = 256
_PERIOD = 10_000
_BUFFERS = ("position_ids",)  # older transformers saved these constants


def clip_h_config() -> CLIPConfig:
    """The config of CLIP ViT-H/14, as `CLIP_H`."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 14}
    act = {"hidden_act": "gelu", "projection_dim": 1024}
    return CLIPConfig(text_config=text | act, vision_config=vision | act, projection_dim=1024)


def tiny_config(tokenizer: PreTrainedTokenizerBase, image_size: int = 64) -> CLIPConfig:
    """The config of a CLIP for small images and a small vocabulary.

    It has about a million parameters. Raises ValueError for a tokenizer that is no CLIP's, such as T5's.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError(f"a tiny CLIP needs a CLIP tokenizer, and the base model has a {type(tokenizer).__name__}")
    tower = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "projection_dim": 96}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length} | tokens
    return CLIPConfig(
        text_config=tower | text | {"num_hidden_layers": 2},
        vision_config=tower | {"num_hidden_layers": 4, "image_size": image_size, "patch_size": 8},
        projection_dim=96,
    )


class TimeEmbedder(nn.Module):
    """(B,) times to (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """(B, width) cosines, then sines, of t.

        Frequencies go from 1 down to almost 1 / period.
        """
        half = _FREQUENCIES // 2
        frequency_F = torch.exp(-math.log(_PERIOD) / half * torch.arange(half, device=t_B.device))
        angle_BF = t_B.float()[:, None] * frequency_F
        return self.mlp(torch.cat([angle_BF.cos(), angle_BF.sin()], dim=1).to(self.mlp[0].weight.dtype))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class StepAwareModel(nn.Module):
    """transformers' CLIP with a time.

    Its state dict is named as the released one. `prompt_ids` and `pixels` prepare the inputs of `forward`; `score`
    does it all.
    """

    def __init__(self, config: CLIPConfig, tokenizer: PreTrainedTokenizerBase | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.model = CLIPModel(config)
        width, vision = config.vision_config.hidden_size, self.model.vision_model
        self.model.t_embedder = TimeEmbedder(width)
        vision.adaLN_modulation = _modulation(width, 2)
        for layer in vision.encoder.layers:
            layer.adaLN_modulation = _modulation(width, 6)
        self.start_time_blind()

    @torch.no_grad()
    def start_time_blind(self) -> None:
        """Set the modulations to the identity, at all times."""
        vision = self.model.vision_model
        for module in (vision, *vision.encoder.layers):
            linear = module.adaLN_modulation[1]
            linear.weight.zero_()
            linear.bias.zero_()
            if module is not vision:
                gates = linear.bias.view(2, 3, -1)[:, 2]  # (shift, scale, gate) of attention, then of the MLP
                gates.fill_(1)
        for place in (0, 2):
            nn.init.normal_(self.model.t_embedder.mlp[place].weight, std=0.02)

    def image_embeddings(self, pixels_B3HW: Tensor, t_B: Tensor) -> Tensor:
        """(B, D) of preprocessed images at times t."""
        vision = self.model.vision_model
        time_BC = self.model.t_embedder(t_B)
        x = vision.pre_layrnorm(vision.embeddings(pixels_B3HW))
        for layer in vision.encoder.layers:
            shift, scale, gate, shift_2, scale_2, gate_2 = layer.adaLN_modulation(time_BC)[:, None].chunk(6, dim=2)
            hidden = layer.layer_norm1(x) * (1 + scale) + shift
            x = x + gate * layer.self_attn(hidden, attention_mask=None)[0]
            x = x + gate_2 * layer.mlp(layer.layer_norm2(x) * (1 + scale_2) + shift_2)
        shift, scale = vision.adaLN_modulation(time_BC).chunk(2, dim=1)
        return self.model.visual_projection(vision.post_layernorm(x[:, 0]) * (1 + scale) + shift)

    def text_embeddings(self, ids_BL: Tensor) -> Tensor:
        """(B, D) embeddings of tokenized prompts."""
        return self.model.text_projection(self.model.text_model(input_ids=ids_BL).pooler_output)

    def forward(self, pixels_B3HW: Tensor, ids_BL: Tensor, t_B: Tensor) -> Tensor:
        """(B,) scores of preprocessed images for tokenized prompts."""
        image, text = self.image_embeddings(pixels_B3HW, t_B), self.text_embeddings(ids_BL)
        return self.model.logit_scale.exp() * cosine_similarity(image, text, dim=1)

    def pixels(self, images_B3HW: Tensor) -> Tensor:
        """Prepare images in [0, 1] for the vision tower.

        The shorter side is resized (bicubic); a centre crop is normalised.
        """
        side = self.config.vision_config.image_size
        height, width = images_B3HW.shape[2:]
        size = [round(length * side / min(height, width)) for length in (height, width)]
        images = images_B3HW.float().to(self._device)
        if size != [height, width]:
            images = interpolate(images, size, mode="bicubic", align_corners=False).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        images = images[:, :, top : top + side, left : left + side]
        mean, std = (torch.tensor(row, device=images.device).view(3, 1, 1) for row in (CLIP_MEAN, CLIP_STD))
        return (images - mean) / std

    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) token ids; long prompts are cut."""
        assert self.tokenizer is not None, "a model that is to read prompts needs its tokenizer"
        length = self.config.text_config.max_position_embeddings
        rows = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        return torch.tensor(rows["input_ids"], device=self._device)

    @torch.no_grad()
    def score(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], t_B: Tensor
    ) -> Tensor:
        """(B,) scores, fp32 on CPU, of images in [0, 1].

        The images are estimates of x0 at the network's time t.
        """
        t_B = t_B.to(self._device)
        return self(self.pixels(images_B3HW), self.prompt_ids(prompts), t_B).float().cpu()

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def save(self, folder: Path) -> None:
        """Write config, weights and tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.config.to_json_string(use_diff=False))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def load(path: str | Path, device: torch.device | str = "cpu") -> StepAwareModel:
    """A frozen model from our folder, or from released weights.

    Released weights are one .safetensors file. Raises ValueError for a source that is missing, damaged, a pickle or
    not of this layout.
    """
    path = Path(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(
            f"{path} is a pickle, which can run code when read; convert it to safetensors where you trust its source "
            f"(rewards/step_aware.py says how), and give that file"
        )
    if path.is_dir():
        config, tokenizer, file = _config(path / CONFIG), str(path), path / WEIGHTS
    elif path.suffix == ".safetensors":
        config, tokenizer, file = clip_h_config(), CLIP_H, path
    else:
        raise ValueError(f"no step-aware preference model at {path}: neither a folder nor a .safetensors file")
    try:
        with torch.device("meta"):  # no memory is taken for weights that the file does not hold
            expected = StepAwareModel(config).state_dict()
    except Exception as error:  # transformers may raise anything for a config
        raise ValueError(f"{path}: {CONFIG} describes no model: {' '.join(str(error).split())[:240]}") from error
    found = _weights(file, expected)
    model = StepAwareModel(config)
    model.load_state_dict(found)
    model.tokenizer = _tokenizer(tokenizer)
    return model.requires_grad_(False).eval().to(device)


def from_clip(name: str) -> StepAwareModel:
    """A model that starts as a CLIP of the hub.

    An example is yuvalkirstain/PickScore_v1. The tokenizer is that of `CLIP_H`. Raises ValueError if the CLIP cannot
    be read, or is a pickle.
    """
    try:
        clip = CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # the hub and transformers may raise anything
        raise ValueError(f"cannot read the CLIP {name!r}: {' '.join(str(error).split())[:240]}") from error
    model = StepAwareModel(clip.config, _tokenizer(name if Path(name).is_dir() else CLIP_H))
    model.model.load_state_dict(clip.state_dict(), strict=False)
    return model


def _config(file: Path) -> CLIPConfig:
    row = _read_json(file)
    try:
        config = CLIPConfig.from_dict(row)
        layers = [part.num_hidden_layers for part in (config.text_config, config.vision_config)]
        if max(layers) > _MOST_LAYERS:
            raise ValueError(f"{max(layers)} layers")
        return config
    except Exception as error:  # transformers may raise anything for a config
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())[:240]}") from error


def _weights(file: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    found = {name: tensor.float() for name, tensor in found.items() if name.rsplit(".", 1)[-1] not in _BUFFERS}
    if wrong := difference(expected, found):
        raise ValueError(f"{file} is not a step-aware preference model: {wrong}")
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        row = json.loads(file.read_bytes())
        if not isinstance(row, dict):
            raise ValueError("it holds no object")
        return row
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"cannot read the tokenizer of {name!r}: {' '.join(str(error).split())[:240]}") from error
