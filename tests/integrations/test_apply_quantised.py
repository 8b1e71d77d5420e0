"""rlg.apply on quantised bases: a LoRA on top, against guidance by hand of two separate networks.

Needs the extra [quant]; `make test-quant` brings it, apart from the environment of all other tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import rlg
from rlg.models import lora
from tests.support.by_hand import add_random_lora, guided_by_hand

TARGETS = ("attn.to_q", "attn.to_v")
Folder = Callable[[str], Path]


def replaced(network: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """The attention's linear layers, quantised."""
    for name, module in list(network.named_modules()):
        if name.endswith(TARGETS):
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, make(module))


def nf4(layer: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    return made.to("cpu")


def int8(layer: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


def gguf(layer: nn.Linear) -> nn.Module:
    numbers = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = numbers.GGMLQuantizationType.Q8_0
    packed = torch.from_numpy(numbers.quants.quantize(layer.weight.data.float().numpy(), kind))
    made = GGUFLinear(layer.in_features, layer.out_features, bias=True, compute_dtype=torch.float32)
    made.weight, made.bias = GGUFParameter(packed, quant_type=kind), layer.bias
    return made


def torchao(layer: nn.Linear) -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig(), filter_fn=lambda module, name: True)
    return layer


KINDS = {"bitsandbytes nf4": nf4, "bitsandbytes int8": int8, "GGUF Q8_0": gguf, "torchao int8": torchao}


def load(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def image(pipe: Any) -> Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe("two red circles", generator=torch.Generator().manual_seed(0), **options).images


@pytest.fixture(scope="module")
def file(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that was trained on the base in full precision."""
    pipe, folder = load(tiny_folder("sd3")), tmp_path_factory.mktemp("lora")
    add_random_lora(pipe.transformer, "aligned", TARGETS, std=0.4)
    tensors = get_peft_model_state_dict(pipe.transformer, adapter_name="aligned")
    pipe.save_lora_weights(folder, transformer_lora_layers=tensors)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_on_a_quantised_base(kind: str, tiny_folder: Folder, file: Path) -> None:
    pipe = load(tiny_folder("sd3"))
    replaced(pipe.transformer, KINDS[kind])
    plain = image(pipe)
    base, tuned = (load(tiny_folder("sd3")).transformer for _ in range(2))
    for network in (base, tuned):
        replaced(network, KINDS[kind])
    add_random_lora(tuned, "mine", TARGETS, std=0.4)
    with guided_by_hand(pipe.transformer, base, tuned, 2.0):
        expected = image(pipe)
    guide = rlg.apply(pipe, file, 2.0)
    torch.testing.assert_close(image(pipe), expected, rtol=1e-2, atol=1e-3)
    assert (expected - plain).abs().max() > 0.05
    guide.scale = 0.0
    torch.testing.assert_close(image(pipe), plain, rtol=1e-2, atol=1e-3)
    guide.unload()
    assert not lora.layers(pipe.transformer)
    torch.testing.assert_close(image(pipe), plain)


def test_a_full_network_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    pipe = load(tiny_folder("sd3"))
    copy.deepcopy(pipe.transformer).save_pretrained(tmp_path)
    replaced(pipe.transformer, gguf)
    with pytest.raises(ValueError, match=r"the transformer is quantised, and the full network at .* is not"):
        rlg.apply(pipe, tmp_path)
