"""Full fine-tuned networks, such as the released Diffusion-DPO UNets.

A full network is a second network beside the base, instead of a LoRA. It is given as the network's own folder, as a
repository with that folder in it (`unet`, `transformer`), or as a whole pipeline. Only the network is taken from a
pipeline: base and tuned model share VAE, text encoders and the prompt's encoding. Only safetensors is read. The
headers are compared with the base before any weight is read.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from rlg.io.parsing import parse_json
from rlg.models import adapter_files, hub, lora
from rlg.models.backbones.networks import MAIN_DENOISERS

CONFIG = "config.json"
_FREE = ("sample_size",)  # networks with the same weights may differ in it
_WEIGHTS = "diffusion_pytorch_model"
_SCHEDULER = "scheduler/scheduler_config.json"
_FILE = re.compile(rf"{_WEIGHTS}(?:\.(?P<variant>\w+))?\.safetensors")
_INDEX = re.compile(rf"{_WEIGHTS}\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")  # lists files of split weights


def is_network(place: str | Path | hub.Source) -> bool:
    """Tell a full network from an adapter. Raises ValueError if there is nothing."""
    source = hub.source(place)
    return source.file is None and not adapter_files.known_files(source) and _folder(source) is not None


def load(pipe: Any, denoiser_name: str, place: str | Path | hub.Source, with_lora: bool = False) -> nn.Module:
    """A full network, as a second one beside the base.

    It is on the base's device and in its precision, and the pipeline is not changed. with_lora: the pipeline's network
    may carry adapters, and the caller makes sure that both networks have them. Raises ValueError if the network is
    missing, damaged, pickled or made for another base. Raises ValueError also if the pipeline's network is quantised,
    or carries a LoRA and so is not the base.
    """
    base, source = lora.unwrapped(getattr(pipe, denoiser_name)), hub.source(place)
    if not isinstance(base, ModelMixin):
        raise ValueError(f"{type(base).__name__} is no network of diffusers")
    if getattr(base, "is_quantized", False) or any(not p.is_floating_point() for p in base.parameters()):
        raise ValueError(
            f"the {denoiser_name} is quantised, and the full network at {source.where()} is not; guide with a LoRA"
        )
    if lora.layers(base) and not with_lora:
        raise ValueError(f"the {denoiser_name} carries a LoRA; call pipe.unload_lora_weights() first")
    folder = _folder(source, denoiser_name)
    if folder is None:
        raise ValueError(
            f"{source.where()} holds no network; expected {denoiser_name}/{CONFIG} or {CONFIG} and weights"
        )
    where = source.where(folder.rstrip("/"))
    _check_class(where, _json(source, folder + CONFIG), base)
    if _SCHEDULER in source.files:
        _check_scheduler(where, _json(source, _SCHEDULER), pipe.scheduler.config)
    variant, files = _weights(source, folder)
    _check_shapes(where, files, base)
    try:
        network = type(base).from_pretrained(
            files[0].parent, dtype=base.dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # diffusers raises many types over a config that it cannot use
        raise ValueError(f"cannot load {where}: {textwrap.shorten(str(error), 240)}") from error
    if hasattr(network, "set_attn_processor"):  # a backbone or the user may have changed those of the base
        network.set_attn_processor(dict(base.attn_processors))
    return network.to(base.device).requires_grad_(False).eval()


def memory(base: nn.Module, tuned: nn.Module) -> str:
    """The memory of two networks, as one line of text."""
    return f"two networks in memory: base {_size(base)}, tuned {_size(tuned)}"


def _size(network: nn.Module) -> str:
    tensors = [*network.parameters(), *network.buffers()]
    parameters = sum(p.numel() for p in network.parameters())
    return f"{parameters / 1e6:.1f}M parameters ({sum(t.numel() * t.element_size() for t in tensors) / 1e6:.1f} MB)"


def _folder(source: hub.Source, denoiser_name: str = "") -> str | None:
    """The network's folder in a source, with a "/" at its end.

    A pipeline's second network is found only by its name.
    """
    for name in MAIN_DENOISERS if denoiser_name in ("", *MAIN_DENOISERS) else (denoiser_name,):
        if f"{name}/{CONFIG}" in source.files:
            return f"{name}/"
    bare = CONFIG in source.files and any(name.startswith(_WEIGHTS) for name in source.files)
    return "" if bare else None


def _json(source: hub.Source, name: str) -> dict[str, Any]:
    text = (source.fetch(name) / name).read_bytes()
    try:
        row = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{source.where(name)} is damaged: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{source.where(name)} is damaged: it holds no mapping")
    return row


def _check_class(where: str, config: Mapping[str, Any], base: nn.Module) -> None:
    found, expected = config.get("_class_name"), type(base).__name__
    if found != expected:
        raise ValueError(f"{where} does not fit this base model: a {found} against a {expected}")
    # The configs are compared first, because a wrong one could make diffusers build a billion layers.
    for name, ours in base.config.items():
        theirs = config.get(name, ours)
        if _is_count(theirs) and theirs != (list(ours) if isinstance(ours, tuple) else ours) and name not in _FREE:
            raise ValueError(f"{where} does not fit this base model: {name} is {theirs} against {ours}")


def _is_count(value: Any) -> bool:
    return type(value) in (int, list)


def _check_scheduler(where: str, config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raise ValueError if two pipelines' networks predict different things.

    Their outputs cannot be mixed.
    """
    found, expected = config.get("prediction_type"), base.get("prediction_type")
    if found and expected and found != expected:
        raise ValueError(f"{where} does not fit this base model: it predicts {found}, the base {expected}")


def _weights(source: hub.Source, folder: str) -> tuple[str | None, list[Path]]:
    """The variant of the weights, and its files on this machine.

    The variant is diffusers' name of it. The plain one is preferred.
    """
    inside = sorted(name.removeprefix(folder) for name in source.files if name.startswith(folder))
    found = [m for name in inside if (m := _FILE.fullmatch(name) or _INDEX.fullmatch(name))]
    if not found:
        raise ValueError(f"{source.where(folder.rstrip('/'))} {_lacks(inside)}")
    best = min(found, key=lambda m: (m["variant"] is not None, m["variant"] != "fp16"))
    names = [best.string]
    if best.re is _INDEX:
        listed = _json(source, folder + best.string).get("weight_map", {})
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"{source.where(folder + best.string)} is damaged: weight_map must name a file a tensor")
        names = sorted(set(listed.values()))
        missing = [name for name in names if folder + name not in source.files]
        if missing or not names:
            raise ValueError(f"{source.where(folder + best.string)} names files that are missing: {missing}")
    root = source.fetch(*(folder + name for name in (*names, CONFIG)))
    return best["variant"], [root / folder / name for name in names]


def _lacks(names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(hub.PICKLES)]
    if pickles:
        return f"holds {pickles[0]}, a pickle, which can run code when read, and no safetensors; convert it"
    return f"holds no {_WEIGHTS}{hub.SAFETENSORS}"


def _check_shapes(where: str, files: list[Path], base: nn.Module) -> None:
    """Raise ValueError unless the files match the base's tensors.

    Each tensor of the base must be there with its shape, and no other tensor may be.
    """
    with lora.hidden_in_state_dict(base):
        expected = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    found = {name: shape for file in files for name, shape in _shapes(file).items()}
    wrong = [f"no weights for {name}" for name in expected if name not in found]
    wrong += [f"no place for {name}" for name in found if name not in expected]
    both = [name for name in expected if name in found and found[name] != expected[name]]
    wrong = [f"{name}: {expected[name]} against {found[name]}" for name in both] + wrong
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{where} does not fit this base model: {wrong[0]}{more}")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error
