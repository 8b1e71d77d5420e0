"""LoRA adapters on disk and in the network: PEFT folders, diffusers and kohya files, and our checkpoints.

Paths and hub ids alike (`rlg.hub`); only safetensors is read. `base_model_name_or_path` in adapter_config.json says
what an adapter was trained on. kohya-style files are renamed by diffusers' own converter, which it has for SD and SDXL
(and some that we have no backbone for), not for SD3.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlg import adapter_config, hub, manifest
from rlg.config import parse_json, read_json

DENOISERS = ("transformer", "unet")  # what diffusers pipelines call their network, and the prefixes in its LoRA files
NAME = "default"  # PEFT's name of the adapter inside the network
PEFT_FOLDER = "adapter"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te")
_NOT_SWITCHED = ", which guidance can't switch between its passes"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk."""

    config: LoraConfig | None  # None for a diffusers file, whose header diffusers reads itself
    tensors: dict[str, Tensor]
    base: str | None  # what it was trained on, where it says so
    path: Path
    converted: bool = False  # the tensors are not named as in the file, and alpha is in them
    header: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a diffusers file: part -> its LoRA's settings


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Within, every LoRA layer of the network passes its input by."""
    with _switched(network, "_disable_adapters", True):
        yield


@contextmanager
def active(network: nn.Module, name: str) -> Iterator[None]:
    """Within, the network's LoRA layers use their adapter of this name."""
    with _switched(network, "_active_adapter", [name]):
        yield


@contextmanager
def mixed(network: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Within, each LoRA layer adds the weighted sum of its adapters' updates: one pass with the merged dense weights.

    Ranks, alphas and layers may differ. To average the factors instead would be another update, with cross terms.
    """
    layers = lora_layers(network)
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: w * layer.scaling[name] for name, w in weights.items() if name in layer.scaling})
    try:
        with _switched(network, "_active_adapter", list(weights)):
            yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def _switched(network: nn.Module, switch: str, value: Any) -> Iterator[None]:
    """PEFT's public switches also move requires_grad, which DDP must not see: these are what they set inside."""
    layers = lora_layers(network)
    before = [getattr(layer, switch) for layer in layers]
    for layer in layers:
        setattr(layer, switch, value)
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            setattr(layer, switch, was)


@contextmanager
def scaled(network: nn.Module, factor: float) -> Iterator[None]:
    """Within, every LoRA update of the network is multiplied by `factor`: the one-pass cousin of guidance."""
    layers = lora_layers(network)
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: factor * value for name, value in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def rows(network: nn.Module, factor_N: Tensor) -> Iterator[None]:
    """Within, the LoRA update of row n of the network's batch is multiplied by factor_N[n]: 0 is the base, 1 tuned.

    One batch then holds passes of several models. The rank's few channels are scaled, before they are projected up.
    Raises ValueError, inside a pass, for a layer whose batch is of another size.
    """

    def scale(module: nn.Module, args: Any, low: Tensor) -> Tensor:
        if len(low) != len(factor_N):
            raise ValueError(f"{len(factor_N)} factors of the LoRA for a batch of {len(low)}")
        return low * factor_N.to(low).reshape(-1, *[1] * (low.ndim - 1))

    layers = lora_layers(network)
    downs = [layer.lora_A[name] for layer in layers for name in layer.active_adapters if name in layer.lora_A]
    handles = [down.register_forward_hook(scale) for down in downs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def known_files(source: hub.Source) -> list[str]:
    """The adapter's weights in a folder, by the names that PEFT, diffusers and we give them, best first."""
    return [n for n in (f"{PEFT_FOLDER}/{PEFT_WEIGHTS}", PEFT_WEIGHTS, DIFFUSERS_FILE) if n in source.files]


def find(path: str | Path) -> Path:
    """The file that holds an adapter's weights, on this machine: given itself, in a folder, or in a hub repository.

    Raises ValueError if there is none, several of unknown names, or a pickle.
    """
    source = hub.source(path)
    name = source.file or _only_file(source)
    if name.endswith(hub.PICKLES):
        raise ValueError(f"{source.where(name)} is a pickle, which can run code when read; convert it to safetensors")
    if not name.endswith(hub.SAFETENSORS):  # diffusers would take a file of another name for a pickle
        raise ValueError(f"{source.where(name)} is no {hub.SAFETENSORS} file")
    beside = name.removesuffix(PEFT_WEIGHTS) + PEFT_CONFIG
    needed = [name, beside] if name.endswith(PEFT_WEIGHTS) and beside in source.files else [name]
    return source.fetch(*needed) / name


def _only_file(source: hub.Source) -> str:
    """The adapter of a folder: of a known name, or the only safetensors file at its top."""
    loose = sorted(n for n in source.files if "/" not in n and n.endswith(hub.SAFETENSORS))
    found = known_files(source) or loose
    if found == loose and len(loose) > 1:
        raise ValueError(f"{source.where()} holds {', '.join(loose)}; say which: {source.where(loose[0])}")
    if found:
        return found[0]
    where, pickles = source.where(), source.pickles()
    if pickles:
        raise ValueError(f"{where} holds {pickles[0]}, a pickle, and no safetensors; convert it to safetensors")
    raise ValueError(f"{where} holds no adapter; expected {PEFT_FOLDER}/{PEFT_WEIGHTS} or {DIFFUSERS_FILE}")


def read(path: str | Path) -> AdapterFile:
    """Read an adapter without touching any network. Raises ValueError if it is missing or damaged."""
    file = find(path)
    if fault := manifest.fault_of(file):
        raise ValueError(f"{file} is damaged or cut short: {fault}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{file} is damaged: {key} holds NaN or an infinity")
    if file.name != PEFT_WEIGHTS:
        return AdapterFile(None, tensors, None, file, header=_read_header(file))
    config = _read_config(file.with_name(PEFT_CONFIG))
    tensors = {k.removeprefix(_PEFT_PREFIX): v for k, v in tensors.items()}
    return AdapterFile(config, tensors, config.base_model_name_or_path, file)


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Settings in a diffusers file, by the part of the pipeline that they are of; diffusers acts on them."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    parts: dict[str, dict[str, Any]] = {}
    try:
        for key, value in parse_json(text).items() if text else ():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = value
        for row in parts.values():
            adapter_config.check_plain(row)
            if isinstance(row.get("target_modules"), str):
                raise ValueError("target_modules must list names, not be a pattern")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: settings in the header: {error}") from error
    return parts


def _read_config(file: Path) -> LoraConfig:
    if not file.is_file():
        raise ValueError(f"{file} is missing; a PEFT folder needs it beside {PEFT_WEIGHTS}")
    try:
        row = read_json(file)
        if row["peft_type"] == "LORA":
            adapter_config.check_plain(row)
        config = LoraConfig.from_pretrained(file.parent) if row["peft_type"] == "LORA" else None
        base = config.base_model_name_or_path if config else None
        if not isinstance(base, (str, NoneType)):
            raise TypeError(f"base_model_name_or_path must be text, got {base!r}")
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if config is None or config.bias != "none" or config.modules_to_save:
        raise ValueError(f"{file} is no plain LoRA (peft_type LORA, bias none), so it can't be switched off")
    return config


def load(pipe: Any, denoiser_name: str, path: str | Path, name: str = NAME) -> AdapterFile:
    """Attach an adapter to a pipeline's network, or leave it as it was; under another name, beside the ones there.

    Raises ValueError if the adapter does not belong to this network, or the network carries one already.
    """
    adapter = read(path)
    network = getattr(pipe, denoiser_name)
    if not isinstance(network, PeftAdapterMixin):
        raise ValueError(f"diffusers' {type(network).__name__} takes no LoRA")
    if lora_layers(network) if name == NAME else _carries(network, name):
        raise ValueError(f"the {denoiser_name} already carries a LoRA; call pipe.unload_lora_weights() first")
    adapter = _from_kohya(pipe, denoiser_name, adapter)
    check_fit(network, adapter)
    attach = _attach_diffusers_file if adapter.config is None else _attach_peft
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several is what is asked for
            attach(pipe, network, adapter, name)
    except Exception as error:  # whatever diffusers and PEFT raise over a config that they cannot use
        network.unload_lora() if name == NAME else network.delete_adapters(name)
        reason = textwrap.shorten(str(error), 240)
        raise ValueError(f"{adapter.path} does not fit this base model: {reason}") from error
    return adapter


def lora_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a module that carry adapters."""
    return [m for m in module.modules() if isinstance(m, BaseTunerLayer)]


def _carries(network: nn.Module, name: str) -> bool:
    return any(name in layer.scaling for layer in lora_layers(network))


def to_float32(network: nn.Module, adapter: AdapterFile, adapter_name: str = NAME) -> None:
    """Hold a loaded adapter in fp32, with the values of its file: loading rounds them to the precision of the base."""
    on_disk = {key.partition(".")[2] if adapter.config is None else key: t for key, t in adapter.tensors.items()}
    for name, parameter in network.named_parameters():
        if ".lora_" in name and f".{adapter_name}." in name:
            value = on_disk.get(
                name.replace(f".{adapter_name}.", "."), parameter.data
            )  # other trainers' names: as loaded
            parameter.data = value.to(parameter.device, torch.float32)


def _from_kohya(pipe: Any, denoiser_name: str, adapter: AdapterFile) -> AdapterFile:
    """A kohya-style file in diffusers' and PEFT's names, alpha / rank in its matrices; others as they are.

    diffusers alone would take one alpha for all attention layers, also where they differ (0.42).
    Raises ValueError for a file that it can't name, and for one that changes a text encoder.
    """
    keys = adapter.tensors.keys()
    if adapter.config is not None or not keys or not all(key.startswith(_KOHYA_PREFIXES) for key in keys):
        return adapter
    config = {"unet_config": pipe.unet.config} if denoiser_name == "unet" else {}
    try:
        renamed = pipe.lora_state_dict(_fold_alpha(adapter.tensors), **config)
    except Exception as error:  # whatever diffusers' converter meets
        reason = textwrap.shorten(str(error), 240)
        raise ValueError(f"{adapter.path} is a kohya-style file that diffusers can't read: {reason}") from error
    renamed = convert_unet_state_dict_to_peft(renamed[0] if isinstance(renamed, tuple) else renamed)
    parts = {key.partition(".")[0] for key in renamed}
    if denoiser_name not in parts:
        kind = type(pipe).__name__
        raise ValueError(f"{adapter.path} is a kohya-style file without a LoRA that diffusers can read into a {kind}")
    if parts != {denoiser_name}:
        raise ValueError(f"{adapter.path} also changes the {min(parts - {denoiser_name})}{_NOT_SWITCHED}")
    return replace(adapter, tensors=renamed, converted=True)


def _fold_alpha(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """kohya's update is alpha / rank * up @ down; here alpha is the rank, and `up` has the factor, in fp32."""
    wrong = next(
        (key for key in tensors if not key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha"))), None
    )
    if wrong:  # diffusers would leave some out, such as DoRA's, and run another function
        raise ValueError(f"{wrong} is no part of a plain LoRA")
    folded = {key: tensor.float() for key, tensor in tensors.items() if not key.endswith(".alpha")}
    for key, alpha in tensors.items():
        if key.endswith(".alpha"):
            layer = key.removesuffix(".alpha")
            folded[f"{layer}.lora_up.weight"] *= float(alpha) / len(folded[f"{layer}.lora_down.weight"])
    return folded


def check_fit(network: nn.Module, adapter: AdapterFile) -> None:
    """Raise ValueError unless every LoRA matrix of the denoiser fits a weight of the network, and has its partner."""
    weights = dict(network.named_parameters())
    trained_on = f" (trained on {adapter.base})" if adapter.base else ""
    misfit = f"{adapter.path}{trained_on} does not fit this base model"
    settings = [adapter.config.to_dict()] if adapter.config else adapter.header.values()
    try:
        for row in settings:
            adapter_config.check_ranks(row, adapter.tensors)
    except ValueError as error:
        raise ValueError(f"{adapter.path} does not fit this base model: {error}") from error
    for key, tensor in adapter.tensors.items():
        prefix, _, name = ("", "", key) if adapter.config else key.partition(".")
        module, _, kind = name.partition(".lora_")
        if prefix not in ("", *DENOISERS) or kind not in ("A.weight", "B.weight"):
            continue  # a text encoder's, or the naming of another trainer: for diffusers to judge
        weight = weights.get(f"{module}.weight", weights.get(f"{module}.base_layer.weight"))  # another adapter's layer
        axis = 0 if kind.startswith("B") else 1
        flat = weight is not None and min(tensor.ndim, weight.ndim) < 2
        if weight is None or flat or tensor.shape[axis] != weight.shape[axis]:
            found = "no such layer" if weight is None else f"{tuple(weight.shape)} against {tuple(tensor.shape)}"
            raise ValueError(f"{misfit}: {module}: {found}")
        partner = f"{key.rpartition('.lora_')[0]}.lora_{'A' if axis == 0 else 'B'}.weight"
        if partner not in adapter.tensors:
            raise ValueError(f"{misfit}: no weights for {partner}")


def _attach_peft(pipe: Any, network: nn.Module, adapter: AdapterFile, name: str) -> None:
    adapter.config.inference_mode = False
    network.add_adapter(adapter_config.named(adapter.config, adapter.tensors), name)
    result = set_peft_model_state_dict(network, adapter.tensors, adapter_name=name)
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        wrong = f"no weights for {missing[0]}" if missing else f"no place for {result.unexpected_keys[0]}"
        raise ValueError(f"{PEFT_CONFIG} and the weights disagree: {wrong}")


def _attach_diffusers_file(pipe: Any, network: nn.Module, adapter: AdapterFile, name: str) -> None:
    if adapter.converted:
        pipe.load_lora_weights(dict(adapter.tensors), adapter_name=name)
    else:  # from the file, whose header may hold alpha
        options = {"weight_name": adapter.path.name, "adapter_name": name, "use_safetensors": True}
        pipe.load_lora_weights(str(adapter.path.parent), **options)
    if not _carries(network, name):
        raise ValueError(f"it holds no LoRA of the denoiser (first key: {next(iter(adapter.tensors), '')!r})")
    others = [part for part, m in pipe.components.items() if isinstance(m, nn.Module) and m is not network]
    also = [part for part in others if lora_layers(getattr(pipe, part))]
    if also:
        pipe.unload_lora_weights() if name == NAME else pipe.delete_adapters(name)
        raise ValueError(f"it also changes the {also[0]}{_NOT_SWITCHED}")
