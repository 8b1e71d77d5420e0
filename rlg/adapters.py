"""LoRA adapters on disk and in the network: PEFT folders, diffusers LoRA files, and our checkpoints that hold both.

Only safetensors is read. `base_model_name_or_path` in adapter_config.json says what an adapter was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAME = "default"  # PEFT's name of the adapter inside the network
PEFT_FOLDER = "adapter"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_PREFIX = "base_model.model."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk."""

    config: LoraConfig | None  # None for a diffusers file, whose header diffusers reads itself
    tensors: dict[str, Tensor]
    base: str | None  # what it was trained on, where it says so
    path: Path


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Within, every LoRA layer of the network passes its input by."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # PEFT's public switch also turns off requires_grad, which DDP must not see
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def scaled(network: nn.Module, factor: float) -> Iterator[None]:
    """Within, every LoRA update of the network is multiplied by `factor`: the one-pass cousin of guidance."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: factor * value for name, value in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def save(pipe: Any, denoiser_name: str, folder: Path, base: str) -> None:
    """Write folder/adapter (PEFT) and folder/pytorch_lora_weights.safetensors (diffusers, alpha in its header)."""
    network = getattr(pipe, denoiser_name)
    state = {k: v.detach().float().cpu().contiguous() for k, v in get_peft_model_state_dict(network).items()}
    config: LoraConfig = network.peft_config[NAME]
    peft_folder = folder / PEFT_FOLDER
    peft_folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(peft_folder)
    save_file({_PEFT_PREFIX + k: v for k, v in state.items()}, peft_folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    header = {f"{denoiser_name}_lora_adapter_metadata": _plain(config)}
    type(pipe).save_lora_weights(folder, **{f"{denoiser_name}_lora_layers": state}, **header)


def _plain(config: LoraConfig) -> dict[str, Any]:
    """The config as JSON-friendly values, as diffusers' own metadata."""
    row = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in row.items()}


def find(path: str | Path) -> Path:
    """The file that holds an adapter's weights: given itself, its PEFT folder, or a checkpoint. Raises ValueError."""
    path = Path(path)
    if path.is_file():
        candidates = [path]
    else:
        candidates = [path / PEFT_FOLDER / PEFT_WEIGHTS, path / PEFT_WEIGHTS, path / DIFFUSERS_FILE]
    for candidate in candidates:
        if candidate.suffix in _PICKLES:
            raise ValueError(f"{candidate} is a pickle, which can run code when read; convert it to safetensors")
        if candidate.is_file():
            return candidate
    if path.is_dir():
        pickles = sorted(p.name for p in path.rglob("*") if p.suffix in _PICKLES)
        if pickles:
            raise ValueError(f"{path} holds {pickles[0]}, a pickle, and no safetensors; convert it to safetensors")
        raise ValueError(f"{path} holds no adapter; expected {PEFT_FOLDER}/{PEFT_WEIGHTS} or {DIFFUSERS_FILE}")
    raise ValueError(f"no such checkpoint: {path}")


def read(path: str | Path) -> AdapterFile:
    """Read an adapter without touching any network. Raises ValueError if it is missing or damaged."""
    file = find(path)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error
    config_file = file.with_name(PEFT_CONFIG)
    if file.name != PEFT_WEIGHTS or not config_file.is_file():
        return AdapterFile(None, tensors, None, file)
    try:
        row = json.loads(config_file.read_text())
        config = LoraConfig.from_pretrained(file.parent)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{config_file} is damaged: {error}") from error
    tensors = {k.removeprefix(_PEFT_PREFIX): v for k, v in tensors.items()}
    return AdapterFile(config, tensors, row.get("base_model_name_or_path"), file)


def load(pipe: Any, denoiser_name: str, path: str | Path) -> AdapterFile:
    """Attach an adapter to a pipeline's network. Raises ValueError if it does not belong to this network."""
    adapter = read(path)
    network = getattr(pipe, denoiser_name)
    if adapter.config is None:
        _load_diffusers_file(pipe, network, adapter)
        return adapter
    check_fit(network, adapter)
    adapter.config.inference_mode = False
    network.add_adapter(adapter.config)
    set_peft_model_state_dict(network, adapter.tensors)
    return adapter


def check_fit(network: nn.Module, adapter: AdapterFile) -> None:
    """Raise ValueError unless every LoRA matrix fits a weight of the network."""
    weights = dict(network.named_parameters())
    for key, tensor in adapter.tensors.items():
        if ".lora_" not in key:
            continue
        module, _, kind = key.partition(".lora_")
        weight = weights.get(f"{module}.weight", weights.get(f"{module}.base_layer.weight"))
        axis = 0 if kind.startswith("B") else 1
        if weight is None or tensor.shape[axis] != weight.shape[axis]:
            found = "no such layer" if weight is None else f"{tuple(weight.shape)} against {tuple(tensor.shape)}"
            trained_on = f" (trained on {adapter.base})" if adapter.base else ""
            raise ValueError(f"{adapter.path}{trained_on} does not fit this base model: {module}: {found}")


def _load_diffusers_file(pipe: Any, network: nn.Module, adapter: AdapterFile) -> None:
    name = next(iter(adapter.tensors), "")
    try:
        pipe.load_lora_weights(str(adapter.path.parent), weight_name=adapter.path.name, adapter_name=NAME)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"{adapter.path} does not fit this base model: {first}") from error
    if not any(isinstance(m, BaseTunerLayer) for m in network.modules()):
        raise ValueError(f"{adapter.path} holds no LoRA of this pipeline's denoiser (first key: {name!r})")
