"""Adapters on disk: one function in every format, read by plain diffusers and PEFT; what does not fit is refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlg.models import adapter_files, lora
from rlg.models.policy import Policy

PROMPTS = ("a red circle", "two blue crosses")
CONFIG = Path("adapter/adapter_config.json")
WEIGHTS = Path("adapter/adapter_model.safetensors")
FILE = Path("pytorch_lora_weights.safetensors")


def inputs(policy: Policy) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(5))
    return x, torch.tensor([300.0, 700.0])


@torch.no_grad()
def output(policy: Policy) -> Tensor:
    return policy.predict(*inputs(policy), policy.encode(PROMPTS))


@pytest.fixture(scope="module")
def bare(tiny_folder: Callable[[str], Path]) -> Policy:
    """A policy without an adapter; refused adapters must leave it so."""
    return Policy.load(str(tiny_folder("sd")))


def test_every_format_is_the_same_function(
    family: str, tiny_policy: Callable[..., Policy], tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    policy = tiny_policy(family)
    policy.save_adapter(tmp_path)
    expected = output(policy)
    files = [tmp_path, tmp_path / "adapter", tmp_path / WEIGHTS]
    assert (tmp_path / FILE).is_file() == hasattr(policy.pipe, "load_lora_weights")
    for path in [*files, *tmp_path.glob(str(FILE))]:
        loaded = Policy.load(str(tiny_folder(family)))
        assert (output(loaded) - expected).abs().max() > 1e-3  # the base: else the test would show nothing
        loaded.load_adapter(path)
        assert torch.equal(output(loaded), expected), path
        assert all(p.requires_grad for p in loaded.trainable())
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == str(tiny_folder(family))
    assert adapter_files.read(tmp_path).base == str(tiny_folder(family))


def test_plain_diffusers_reads_the_checkpoint(
    family: str,
    tiny_policy: Callable[..., Policy],
    tiny_folder: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    """With alpha 8 over rank 4, which a reader that loses alpha would take for 1."""
    policy = tiny_policy(family)
    pipe = DiffusionPipeline.from_pretrained(tiny_folder(family))
    if not hasattr(pipe, "load_lora_weights"):
        pytest.skip("diffusers has no LoRA files of this family")
    pipe.load_lora_weights(tiny_checkpoint(family))
    plain = policy.backbone
    with torch.no_grad():
        out = plain.forward(plain.denoiser(pipe), *inputs(policy), plain.encode(pipe, PROMPTS))
    torch.testing.assert_close(out, output(policy), rtol=1e-4, atol=1e-5)


def test_plain_peft_reads_the_folder(
    family: str,
    tiny_policy: Callable[..., Policy],
    tiny_folder: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    policy = tiny_policy(family)
    pipe = DiffusionPipeline.from_pretrained(tiny_folder(family))
    plain = policy.backbone
    cond = plain.encode(pipe, PROMPTS)
    network = peft.PeftModel.from_pretrained(plain.denoiser(pipe), tiny_checkpoint(family) / "adapter")
    with torch.no_grad():
        out = plain.forward(network, *inputs(policy), cond)
    torch.testing.assert_close(out, output(policy), rtol=1e-4, atol=1e-5)


def test_the_adapter_is_float32_over_a_bfloat16_base(
    tiny_folder: Callable[[str], Path], tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    policy = Policy.load(str(tiny_folder("sd3")), "bfloat16")
    base = [p.dtype for p in policy.network.parameters()]
    assert set(base) == {torch.bfloat16}
    policy.load_adapter(tiny_checkpoint("sd3"))
    lora = [p for name, p in policy.network.named_parameters() if "lora_" in name]
    assert lora
    assert {p.dtype for p in lora} == {torch.float32}
    assert {p.dtype for n, p in policy.network.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert [p.requires_grad for p in policy.network.parameters()].count(True) == len(lora)
    assert output(policy).dtype == torch.bfloat16
    lora[0].data += 1e-6 * lora[0].data.abs().max()  # far below bfloat16's resolution
    policy.save_adapter(tmp_path)
    for path in (tmp_path, tmp_path / FILE):
        again = Policy.load(str(tiny_folder("sd3")), "bfloat16")
        again.load_adapter(path)
        assert {p.dtype for p in again.trainable()} == {torch.float32}
        assert all(torch.equal(old, new) for old, new in zip(lora, again.trainable(), strict=True))


def test_a_new_adapter_is_the_base_and_trains_in_float32(
    tiny_folder: Callable[[str], Path], tiny_policy: Callable[..., Policy]
) -> None:
    policy = tiny_policy("sd", fresh=True)
    assert torch.equal(output(policy), output(Policy.load(str(tiny_folder("sd")))))
    half = Policy.load(str(tiny_folder("sd")), "bfloat16")
    assert {p.dtype for p in half.add_lora(4, 8)} == {torch.float32}


@pytest.mark.numerics
def test_adapter_off_is_the_base_bitwise(
    family: str, tiny_policy: Callable[..., Policy], tiny_folder: Callable[[str], Path]
) -> None:
    policy, base = tiny_policy(family), Policy.load(str(tiny_folder(family)))
    tuned, expected = output(policy), output(base)
    with policy.adapter_off():
        assert torch.equal(output(policy), expected)
        with torch.no_grad():
            reference = policy.reference(*inputs(policy), policy.encode(PROMPTS))
        assert torch.equal(reference, expected)
        assert torch.equal(output(policy), expected)  # the reference's own switch doesn't undo the outer one
    assert torch.equal(output(policy), tuned)
    assert not torch.equal(tuned, expected)
    with pytest.raises(KeyError), policy.adapter_off():
        raise KeyError
    assert torch.equal(output(policy), tuned)


def test_reference_takes_no_gradient_from_the_adapter_and_keeps_it_trainable(
    tiny_policy: Callable[..., Policy],
) -> None:
    policy = tiny_policy("sd3")
    x, t_B = inputs(policy)
    cond = policy.encode(PROMPTS)
    assert not policy.reference(x, t_B, cond).requires_grad
    assert all(p.requires_grad for p in policy.trainable())
    policy.predict(x, t_B, cond).sum().backward()
    assert all(p.grad is not None for p in policy.trainable())


def test_scaled_multiplies_the_update(tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy("sd3")
    tuned = output(policy)
    with policy.adapter_off():
        base = output(policy)
    with lora.scaled(policy.network, 1.0):
        assert torch.equal(output(policy), tuned)
    with lora.scaled(policy.network, 0.0):
        torch.testing.assert_close(output(policy), base, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError), lora.scaled(policy.network, 3.0):
        tripled = output(policy)
        raise KeyError
    assert torch.equal(output(policy), tuned)
    for name, parameter in policy.network.named_parameters():
        if "lora_B" in name:
            parameter.data *= 3
    torch.testing.assert_close(output(policy), tripled, rtol=1e-5, atol=1e-5)


def cut(file: Path) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def written(file: Path, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content)


def configured(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        row = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(row | values))

    return change


def kept(count: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file(dict(list(load_file(folder / WEIGHTS).items())[:count]), folder / WEIGHTS)

    return change


def narrowed(folder: Path) -> None:
    save_file({k: v[:, :-8].contiguous() for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (cut(WEIGHTS), "adapter_model.safetensors is damaged or cut short"),
    "weights empty": (written(WEIGHTS, b""), "adapter_model.safetensors is damaged or cut short"),
    "diffusers file cut short": (
        lambda folder: (shutil.rmtree(folder / "adapter"), cut(FILE)(folder)),
        "pytorch_lora_weights.safetensors is damaged or cut short",
    ),
    "config cut short": (cut(CONFIG), "adapter_config.json is damaged"),
    "config not UTF-8": (written(CONFIG, b"\xff\xfe{}"), "adapter_config.json is damaged"),
    "config no mapping": (written(CONFIG, b"[1]"), "adapter_config.json is damaged"),
    "config missing": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json is missing"),
    "not a LoRA": (configured(peft_type="LOHA"), "adapter_config.json is no plain LoRA"),
    "unknown type": (configured(peft_type="NONE"), "adapter_config.json is no plain LoRA"),
    "trains biases": (configured(bias="all"), "adapter_config.json is no plain LoRA"),
    "trains whole modules": (configured(modules_to_save=["conv_in"]), "adapter_config.json is no plain LoRA"),
    "rank of the config": (configured(r=8), "adapter_model.safetensors does not fit .* size mismatch"),
    "rank no number": (configured(r="four"), "adapter_model.safetensors does not fit"),
    "targets of the config": (configured(target_modules=["to_q"]), "does not fit .* no place for .*to_k"),
    "unknown targets": (configured(target_modules=["nothing"]), "does not fit .*nothing"),
    "no weights": (kept(0), "does not fit .* no weights for"),
    "half of the weights": (kept(6), "does not fit .* no weights for"),
    "other width": (narrowed, r"does not fit this base model: .*to_k: \(64, 64\) against \(4, 56\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_and_leaves_the_network_alone(
    case: str, bare: Policy, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-7"
    shutil.copytree(tiny_checkpoint("sd"), folder)
    damage, message = BROKEN[case]
    damage(folder)
    before = output(bare)
    with pytest.raises(ValueError, match=message) as error:
        bare.load_adapter(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert not lora.layers(bare.network)
    assert not any("lora" in name for name, _ in bare.network.named_parameters())
    assert torch.equal(output(bare), before)


@pytest.mark.parametrize("source", ["sd3", "sdxl"])
@pytest.mark.parametrize("file", [".", "adapter", str(FILE)])
def test_an_adapter_of_another_base_is_refused(
    source: str, file: str, bare: Policy, tiny_checkpoint: Callable[[str], Path], tiny_folder: Callable[[str], Path]
) -> None:
    path = tiny_checkpoint(source) / file
    with pytest.raises(ValueError, match="does not fit this base model") as error:
        bare.load_adapter(path)
    assert str(path) in str(error.value)
    if file != str(FILE):
        assert f"trained on {tiny_folder(source)}" in str(error.value)
    assert not lora.layers(bare.network)


def test_paths_without_an_adapter_are_refused(
    bare: Policy, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not weights")
    weights = tiny_folder("sd") / "unet" / "diffusion_pytorch_model.safetensors"
    cases = {
        tmp_path / "nothing": f"no such checkpoint: {tmp_path / 'nothing'}",
        tiny_folder("sd"): f"{tiny_folder('sd')} holds no adapter; expected adapter/adapter_model.safetensors",
        text: f"{text} is no .safetensors file",
        weights: f"{weights} does not fit this base model: Invalid LoRA checkpoint",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            bare.load_adapter(path)
    assert not lora.layers(bare.network)


def test_a_second_adapter_is_refused(
    tiny_policy: Callable[..., Policy], tiny_checkpoint: Callable[[str], Path]
) -> None:
    policy = tiny_policy("sd")
    before = output(policy)
    for path in (tiny_checkpoint("sd"), tiny_checkpoint("sd") / FILE):
        with pytest.raises(ValueError, match="the unet already carries a LoRA"):
            policy.load_adapter(path)
    assert torch.equal(output(policy), before)


def test_a_lora_that_changes_the_text_encoder_is_refused(
    bare: Policy, tiny_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Both passes share one encoded prompt, so its base pass would not be the base."""
    pipe = tiny_policy("sd").pipe
    pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    layers = {
        "unet_lora_layers": get_peft_model_state_dict(pipe.unet),
        "text_encoder_lora_layers": get_peft_model_state_dict(pipe.text_encoder, adapter_name="default"),
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    with pytest.raises(ValueError, match="also changes the text_encoder"):
        bare.load_adapter(tmp_path)
    assert not lora.layers(bare.network)
    assert not lora.layers(bare.pipe.text_encoder)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return open, (str(self.file), "w")


def test_the_trap_springs(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.bin",
        "pytorch_lora_weights.bin",
        "adapter.pt",
        "adapter.pth",
        "adapter.ckpt",
        "adapter.pkl",
        "adapter.safetensors",  # only its name is safe
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["file", "folder"])
def test_a_pickle_is_refused_unread(
    name: str, named: bool, bare: Policy, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tmp_path / "theirs"
    (folder / "adapter").mkdir(parents=True)
    shutil.copy(tiny_checkpoint("sd") / CONFIG, folder / CONFIG)
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    safe_name = name.endswith(".safetensors")
    message = "is damaged" if safe_name else "a pickle"
    with pytest.raises(ValueError, match=message) as error:
        bare.load_adapter(folder / name if named else folder)
    assert str(folder) in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_the_adapter_is_not_read(
    bare: Policy, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], tiny_folder: Callable[[str], Path]
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_checkpoint("sd"), folder)
    for name in ("adapter/adapter_model.bin", "pytorch_lora_weights.bin", "state.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for path in (folder, folder / FILE):
        Policy.load(str(tiny_folder("sd"))).load_adapter(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("trapped", [True, False], ids=["trapped", "sound"])
@pytest.mark.parametrize(
    ("safe", "pickled"),
    [
        ("unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model"),
        ("text_encoder/model", "text_encoder/pytorch_model"),
    ],
)
def test_a_base_model_in_pickles_is_refused(
    safe: str, pickled: str, trapped: bool, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also where the pickle holds nothing but the right weights."""
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_folder("sd"), folder)
    weights = load_file(folder / f"{safe}.safetensors")
    (folder / f"{safe}.safetensors").unlink()
    if trapped:
        (folder / f"{pickled}.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    else:
        torch.save(weights, folder / f"{pickled}.bin")
    with pytest.raises(ValueError, match="cannot load the base model") as error:
        Policy.load(str(folder))
    assert str(folder) in str(error.value)
    assert not (tmp_path / "sprung").exists()
