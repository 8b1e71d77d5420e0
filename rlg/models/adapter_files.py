"""LoRA adapters: reading from disk, and loading into a network.

An adapter is a PEFT folder, a diffusers or kohya file, or a checkpoint of this project. It is given as a path or a hub
id (`rlg.models.hub`), and only safetensors is read. `base_model_name_or_path` in adapter_config.json names the base
that it was trained on. Diffusers' own converter renames kohya-style files. It exists for SD and SDXL, and not for SD3.
"""

from __future__ import annotations

import copy
import dataclasses
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlg.io import manifest, public_names, run_folder
from rlg.io.parsing import parse_json, read_json
from rlg.models import adapter_config, hub, lora
from rlg.models.backbones.networks import MAIN_DENOISERS, loader_options

NAME = "default"  # PEFT's name of the adapter inside the network
PEFT_FOLDER = run_folder.ADAPTER
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te")
_BARE = ""  # key of settings that name no part of the pipeline
_NOT_SWITCHED = ", which guidance can't switch between its passes"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter, read from disk."""

    config: LoraConfig | None  # None for a diffusers file, whose header diffusers reads itself
    tensors: dict[str, Tensor]
    base: str | None  # the base that it names, if any
    path: Path
    given: str  # the path or hub id that the user gave
    converted: bool = False  # the tensors have other names than in the file, and are multiplied by alpha / rank
    header: dict[str, dict[str, Any]] = field(default_factory=dict)  # diffusers file: settings of a LoRA, by part


def save(pipe: Any, denoiser_name: str, folder: Path, base: str) -> None:
    """Write an adapter as a PEFT folder and as a diffusers file.

    They are folder/adapter and folder/pytorch_lora_weights.safetensors, which has alpha in its header. The second is
    only written if diffusers loads LoRA files into this pipeline.
    """
    network = getattr(pipe, denoiser_name)
    state = {k: v.detach().float().cpu().contiguous() for k, v in get_peft_model_state_dict(network).items()}
    config: LoraConfig = network.peft_config[NAME]
    peft_folder = folder / PEFT_FOLDER
    peft_folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(peft_folder)
    save_file({_PEFT_PREFIX + k: v for k, v in state.items()}, peft_folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    named = {"base_model_name_or_path": public_names.base(base)}  # users publish this file
    header = {f"{denoiser_name}_lora_adapter_metadata": _plain(config) | named}
    if hasattr(pipe, "save_lora_weights"):
        type(pipe).save_lora_weights(folder, **{f"{denoiser_name}_lora_layers": state}, **header)


def _plain(config: LoraConfig) -> dict[str, Any]:
    """The config as JSON-friendly values, as in diffusers' own metadata."""
    row = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in row.items()}


def known_files(source: hub.Source) -> list[str]:
    """Names of an adapter's weights in a folder, best first.

    Only the names that PEFT, diffusers and this project use are known.
    """
    return [n for n in (f"{PEFT_FOLDER}/{PEFT_WEIGHTS}", PEFT_WEIGHTS, DIFFUSERS_FILE) if n in source.files]


def find(place: str | Path | hub.Source) -> Path:
    """The file that holds an adapter's weights, on this machine.

    place: the file, a folder with it, or a hub repository with it. Raises ValueError if there is none, if there are
    several of unknown names, and for a pickle.
    """
    source = hub.source(place)
    name = source.file or _only_file(source)
    if name.endswith(hub.PICKLES):
        raise ValueError(f"{source.where(name)} is a pickle, which can run code when read; convert it to safetensors")
    if not name.endswith(hub.SAFETENSORS):  # diffusers would read a file with another suffix as a pickle
        raise ValueError(f"{source.where(name)} is no {hub.SAFETENSORS} file")
    beside = name.removesuffix(PEFT_WEIGHTS) + PEFT_CONFIG
    needed = [name, beside] if name.endswith(PEFT_WEIGHTS) and beside in source.files else [name]
    return source.fetch(*needed) / name


def _only_file(source: hub.Source) -> str:
    """The name of the adapter's file in a folder.

    It is a known name, or the only safetensors file at the top.
    """
    loose = sorted(n for n in source.files if "/" not in n and n.endswith(hub.SAFETENSORS))
    found = known_files(source) or loose
    if found == loose and len(loose) > 1:
        raise ValueError(f"{source.where()} holds {', '.join(loose)}; say which: {source.where(loose[0])}")
    if found:
        return found[0]
    where, pickles = source.where(), source.pickles()
    check_no_run(where)
    if pickles:
        raise ValueError(f"{where} holds {pickles[0]}, a pickle, and no safetensors; convert it to safetensors")
    raise ValueError(f"{where} holds no adapter; expected {PEFT_FOLDER}/{PEFT_WEIGHTS} or {DIFFUSERS_FILE}")


def check_no_run(folder: str | Path) -> None:
    """Raise ValueError for a run's folder, and list its checkpoints.

    The user means one of them.
    """
    steps = [run_folder.step_of(entry.name) for entry in Path(folder).glob("*") if entry.is_dir()]
    found = [run_folder.checkpoint_name(step) for step in sorted(step for step in steps if step is not None)]
    if found:
        raise ValueError(
            f"{folder} is a run's folder; give a checkpoint of it: {Path(folder) / found[-1]}"
            + (f" (or {', '.join(found[:-1])})" if found[:-1] else "")
        )


def with_settings(file: Path) -> dict[str, Path]:
    """The files of an adapter, by name; a PEFT folder has two."""
    beside = file.with_name(PEFT_CONFIG)
    files = [file, beside] if file.name == PEFT_WEIGHTS and beside.is_file() else [file]
    return {each.name: each for each in files}


def read(path: str | Path) -> AdapterFile:
    """Read an adapter without touching any network. Raises ValueError if it is missing or damaged."""
    return read_file(find(path), str(path))


def read_file(file: Path, given: str) -> AdapterFile:
    """Read the file that `find` found.

    given: the path or hub id that the user gave, for messages. Raises ValueError if the file is damaged.
    """
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
        header = _read_header(file)
        if _BARE in header:  # diffusers' `save_lora_adapter` writes no prefix: all is about the denoiser
            config = _plain_config(file, header[_BARE])
            return AdapterFile(config, tensors, config.base_model_name_or_path, file, given)
        return AdapterFile(None, tensors, None, file, given, header=header)
    config = _read_config(file.with_name(PEFT_CONFIG))
    tensors = {k.removeprefix(_PEFT_PREFIX): v for k, v in tensors.items()}
    return AdapterFile(config, tensors, config.base_model_name_or_path, file, given)


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Settings in the header of a diffusers file, by pipeline part."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    parts: dict[str, dict[str, Any]] = {}
    try:
        for key, value in parse_json(text).items() if text else ():
            part, _, name = key.rpartition(".")
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
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return _plain_config(file, row)


def _plain_config(file: Path, row: dict[str, Any]) -> LoraConfig:
    """The settings of a plain LoRA.

    Raises ValueError for damaged settings, and for another kind of adapter.
    """
    known = {f.name for f in dataclasses.fields(LoraConfig)} - {"peft_type"}
    try:
        is_lora = row["peft_type"] == "LORA"
        if is_lora:
            adapter_config.check_plain(row)
        config = LoraConfig(**{key: value for key, value in row.items() if key in known}) if is_lora else None
        if config and not isinstance(config.base_model_name_or_path, (str, NoneType)):
            raise TypeError(f"base_model_name_or_path must be text, got {config.base_model_name_or_path!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if config is None or config.bias != "none" or config.modules_to_save:
        raise ValueError(f"{file} is no plain LoRA (peft_type LORA, bias none), so it can't be switched off")
    return config


def load(pipe: Any, denoiser_name: str, adapter: AdapterFile, name: str = NAME, beside: bool = False) -> AdapterFile:
    """Attach an adapter to a pipeline's network.

    name: another name attaches it beside the adapters that are there. beside: the active adapters stay active, under
    any name. Returns the adapter in the network's names. Raises ValueError if the adapter does not belong to this
    network, or if the network carries one already. The network then stays as it was.
    """
    network = lora.unwrapped(getattr(pipe, denoiser_name))
    if not isinstance(network, ModelMixin):
        raise ValueError(f"diffusers' {type(network).__name__} takes no LoRA")
    if lora.layers(network) if name == NAME and not beside else lora.carrying(network, [name]):
        raise ValueError(f"the {denoiser_name} already carries a LoRA; call pipe.unload_lora_weights() first")
    adapter = _from_kohya(pipe, denoiser_name, adapter)
    check_fit(network, adapter)
    if beside and (twin := _twin(network, adapter)):
        raise ValueError(
            f"{adapter.given} is attached already, as {twin!r}; give rlg.apply(pipe, adapters=[{twin!r}])"
        )
    attach = _attach_diffusers_file if adapter.config is None else _attach_peft
    before = {id(layer): layer.active_adapters for layer in lora.layers(network)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are wanted
            attach(pipe, network, adapter, name)
    except Exception as error:  # diffusers and PEFT raise many types over a config that they cannot use
        _undo(network, name, before)
        reason = textwrap.shorten(str(error), 240)
        raise ValueError(f"{adapter.path} does not fit this base model: {reason}") from error
    if beside:
        for layer in lora.layers(network):
            layer._active_adapter = [*before.get(id(layer), []), *([name] if name in layer.scaling else [])]
    return adapter


def _undo(network: nn.Module, name: str, before: dict[int, list[str]]) -> None:
    """Remove all that a failed loading has attached."""
    lora.detach(network, name)
    getattr(network, "peft_config", {}).pop(name, None)
    if not before:
        lora.remove_layers(network)
    for layer in lora.layers(network):
        layer._active_adapter = before.get(id(layer), layer.active_adapters)


def _twin(network: nn.Module, adapter: AdapterFile) -> str | None:
    """The name of an attached adapter with the same matrices.

    The user may have attached it by load_lora_weights.
    """
    there = dict(network.named_modules())
    for key, ours in adapter.tensors.items():
        module, _, kind = _without_part(key).partition(".lora_")
        layer = there.get(module)
        if kind == "A.weight" and isinstance(layer, BaseTunerLayer):
            for name, down in layer.lora_A.items():
                theirs = down.weight.detach().cpu()
                if theirs.shape == ours.shape and torch.equal(theirs, ours.to(theirs.dtype)):
                    return name
    return None


def _without_part(key: str) -> str:
    """A tensor's name inside the denoiser."""
    part, _, name = key.partition(".")
    return name if part in MAIN_DENOISERS else key


def to_float32(network: nn.Module, adapter: AdapterFile, adapter_name: str = NAME) -> None:
    """Restore a loaded adapter's values in fp32 from its file.

    Loading rounds them to the precision of the base.
    """
    on_disk = {key.partition(".")[2] if adapter.config is None else key: t for key, t in adapter.tensors.items()}
    for name, parameter in network.named_parameters():
        if ".lora_" in name and f".{adapter_name}." in name:
            # A file of another trainer may use other names. Then the loaded values stay.
            value = on_disk.get(name.replace(f".{adapter_name}.", "."), parameter.data)
            parameter.data = value.to(parameter.device, torch.float32, copy=True)  # training changes it in place


def _from_kohya(pipe: Any, denoiser_name: str, adapter: AdapterFile) -> AdapterFile:
    """A kohya-style file in the names of diffusers and PEFT.

    Its matrices are multiplied by alpha / rank, because diffusers would use one alpha for all attention layers, even
    where they differ (0.42). Other files are returned as they are. Raises ValueError for a file that diffusers cannot
    rename, and for one that changes a text encoder.
    """
    keys = adapter.tensors.keys()
    if adapter.config is not None or not keys or not all(key.startswith(_KOHYA_PREFIXES) for key in keys):
        return adapter
    config = {f"{denoiser_name}_config": getattr(pipe, denoiser_name).config}  # the names of SDXL's blocks need it
    try:
        renamed = pipe.lora_state_dict(_fold_alpha(adapter.tensors), **config)
    except Exception as error:  # diffusers' converter raises many types
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
    """Multiply kohya's `up` matrices by alpha / rank, in fp32.

    kohya's update is alpha / rank * up @ down. In the result, alpha is the rank.
    """
    wrong = next(
        (key for key in tensors if not key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha"))), None
    )
    if wrong:  # diffusers would leave out some of these, such as DoRA's, and compute another function
        raise ValueError(f"{wrong} is no part of a plain LoRA")
    folded = {key: tensor.float() for key, tensor in tensors.items() if not key.endswith(".alpha")}
    for key, alpha in tensors.items():
        if key.endswith(".alpha"):
            layer = key.removesuffix(".alpha")
            folded[f"{layer}.lora_up.weight"] *= float(alpha) / len(folded[f"{layer}.lora_down.weight"])
    return folded


def check_fit(network: nn.Module, adapter: AdapterFile) -> None:
    """Raise ValueError unless every LoRA matrix fits the network.

    A matrix of the denoiser needs a layer of its shape, and its partner.
    """
    modules = dict(network.named_modules())
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
        if prefix not in ("", *MAIN_DENOISERS) or kind not in ("A.weight", "B.weight"):
            continue  # diffusers checks a text encoder's matrices, and the names of other trainers
        axis = 0 if kind.startswith("B") else 1
        shape = _weight_shape(modules.get(module))
        if shape is None or min(tensor.ndim, len(shape)) < 2 or tensor.shape[axis] != shape[axis]:
            found = "no such layer" if shape is None else f"{shape} against {tuple(tensor.shape)}"
            raise ValueError(f"{misfit}: {module}: {found}")
        partner = f"{key.rpartition('.lora_')[0]}.lora_{'A' if axis == 0 else 'B'}.weight"
        if partner not in adapter.tensors:
            raise ValueError(f"{misfit}: no weights for {partner}")


def _weight_shape(module: nn.Module | None) -> tuple[int, ...] | None:
    """Shape (out, in, ...) of a layer's weight in computations.

    A quantised weight is stored in another shape.
    """
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _attach_peft(pipe: Any, network: nn.Module, adapter: AdapterFile, name: str) -> None:
    # The network keeps and changes the config, so it gets a copy.
    config = copy.deepcopy(adapter_config.named(adapter.config, adapter.tensors))
    config.inference_mode = False
    with _offloading_paused(pipe):
        lora.attach(network, config, name)
        result = set_peft_model_state_dict(network, adapter.tensors, adapter_name=name)
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        wrong = f"no weights for {missing[0]}" if missing else f"no place for {result.unexpected_keys[0]}"
        raise ValueError(f"{PEFT_CONFIG} and the weights disagree: {wrong}")


@contextmanager
def _offloading_paused(pipe: Any) -> Iterator[None]:
    """Keep hooks from moving the pipeline's weights.

    Layers that are added meanwhile get the same hooks as the others, as in diffusers.
    """
    by_model, sequential, by_group = _func_optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        if by_model:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)
        elif by_group:
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(part)


def _attach_diffusers_file(pipe: Any, network: nn.Module, adapter: AdapterFile, name: str) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"diffusers has no loader of its LoRA files for a {type(pipe).__name__}; give a PEFT folder")
    second = loader_options(pipe, network)
    if adapter.converted:
        pipe.load_lora_weights(dict(adapter.tensors), adapter_name=name, **second)
    else:  # diffusers reads alpha from the file's header
        options = {"weight_name": adapter.path.name, "adapter_name": name, "use_safetensors": True, **second}
        pipe.load_lora_weights(str(adapter.path.parent), **options)
    if not lora.carrying(network, [name]):
        raise ValueError(f"it holds no LoRA of the denoiser (first key: {next(iter(adapter.tensors), '')!r})")
    if also := lora.other_parts(pipe, network, [name]):
        for part in also:
            lora.detach(getattr(pipe, part), name)
        raise ValueError(f"it also changes the {also[0]}{_NOT_SWITCHED}")
