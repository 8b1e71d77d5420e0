"""Adapters made elsewhere: kohya-style files, and hub ids in the hub's own cache layout."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlg import sample
from rlg.models import adapter_files, hub, lora
from rlg.models.policy import Policy

PROMPTS = ("a red circle", "two blue crosses")
REPO = "someone/rl-lora_v1.5"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1"]
PEFT, DIFFUSERS = "adapter/adapter_model.safetensors", "pytorch_lora_weights.safetensors"


@torch.no_grad()
def output(policy: Policy) -> Tensor:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(5))
    return policy.predict(x, torch.tensor([300.0, 700.0]), policy.encode(PROMPTS))


@pytest.fixture(scope="module")
def bare(tiny_folder: Callable[[str], Path]) -> Callable[[str], Policy]:
    """A policy of a family without an adapter, made once; a test that attaches one takes it off again."""
    made: dict[str, Policy] = {}

    def policy(family: str) -> Policy:
        if family not in made:
            made[family] = Policy.load(str(tiny_folder(family)))
        return made[family]

    return policy


def attached(policy: Policy, path: Path | str) -> Tensor:
    """The output with an adapter, which is taken off afterwards."""
    policy.load_adapter(path)
    try:
        return output(policy)
    finally:
        policy.network.unload_lora()


def varied(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    """The output with a LoRA of several ranks and alphas, on convolutions too, and that LoRA as a kohya-style file."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern={"to_v": 2},
        alpha_pattern={"to_k": 1, "conv1": 2, "proj_in": 4},
    )
    torch.manual_seed(1)
    policy.network.add_adapter(config, adapter_files.NAME)
    try:
        for name, parameter in policy.network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        scaling = {n: m.scaling["default"] for n, m in policy.network.named_modules() if hasattr(m, "lora_A")}
        assert set(scaling.values()) == {2.0, 4.0, 0.25, 0.5, 1.0}
        tensors: dict[str, Tensor] = {}
        for key, tensor in get_peft_model_state_dict(policy.network).items():
            module, kind = key.split(".lora_")
            name = (
                f"lora_unet_{kohya_name(module, sgm=policy.backbone.denoiser(policy.pipe).config.addition_embed_type)}"
            )
            tensors[f"{name}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = tensor.clone()
            if kind.startswith("A") and scaling[module] != 1:  # left out, alpha is the rank
                tensors[f"{name}.alpha"] = torch.tensor(scaling[module] * len(tensor))
        return output(policy), tensors
    finally:
        policy.network.unload_lora()


def kohya_name(module: str, sgm: str | None) -> str:
    """sd-scripts trains SD 1.x by diffusers' names and SDXL by those of Stability's code; one layer a block, here."""
    if sgm:
        module = re.sub(r"down_blocks\.(\d)\.(\w+)\.0", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.{m[2]}", module)
        module = re.sub(
            r"up_blocks\.(\d)\.(\w+)\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[3])}.{m[2]}", module
        )
        module = re.sub(r"mid_block\.attentions\.0", "middle_block.1", module)
        module = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", module)
        module = module.replace("resnets", "0").replace("attentions", "1").replace("conv1", "in_layers.2")
    return module.replace(".", "_")


# --- kohya-style files


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_kohya_file_is_the_same_function(family: str, bare: Callable[[str], Policy], tmp_path: Path) -> None:
    """With alphas and ranks that differ between layers, which diffusers' own loader gets wrong."""
    policy, file = bare(family), tmp_path / "style.safetensors"
    base, (expected, tensors) = output(policy), varied(policy)
    assert any("input_blocks" in key for key in tensors) == (family == "sdxl")
    save_file(tensors, file)
    found = attached(policy, file)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    assert torch.equal(output(policy), base)


def test_a_kohya_file_keeps_its_precision_over_a_bfloat16_base(
    bare: Callable[[str], Policy], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    _, tensors = varied(bare("sd"))
    save_file(tensors, tmp_path / "style.safetensors")
    policy = Policy.load(str(tiny_folder("sd")), "bfloat16")
    policy.load_adapter(tmp_path / "style.safetensors")
    found = {p.double().sum().item() for p in policy.trainable()}
    downs = {t.double().sum().item() for k, t in tensors.items() if k.endswith("down.weight")}
    assert {p.dtype for p in policy.trainable()} == {torch.float32}
    assert len(downs) > 10 and downs <= found


KOHYA_LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]
BROKEN: dict[str, tuple[Damage, str]] = {
    "no up": (lambda t: {k: v for k, v in t.items() if k != f"{KOHYA_LAYER}.lora_up.weight"}, "lora_up.weight"),
    "no down": (lambda t: {k: v for k, v in t.items() if k != f"{KOHYA_LAYER}.lora_down.weight"}, "lora_down.weight"),
    "DoRA": (lambda t: t | {f"{KOHYA_LAYER}.dora_scale": torch.ones(1, 128)}, "dora_scale is no part of a plain LoRA"),
    "LoHa": (lambda t: {f"{KOHYA_LAYER}.hada_w1_a": torch.ones(4, 4)}, "hada_w1_a is no part of a plain LoRA"),
    "width": (
        lambda t: t | {f"{KOHYA_LAYER}.lora_down.weight": torch.ones(4, 120)},
        r"does not fit this base model: mid_block.*attn1.to_q: \(128, 128\) against \(4, 120\)",
    ),
    "unknown layer": (
        lambda t: {k.replace("mid_block", "down_blocks_7"): v for k, v in t.items()},
        "does not fit this base model: down_blocks.7.*: no such layer",
    ),
    "text encoder": (
        lambda t: (
            t
            | {
                f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{d}.weight": torch.ones(s)
                for d, s in (("down", (4, 64)), ("up", (64, 4)))
            }
        ),
        "also changes the text_encoder, which guidance can't switch",
    ),
    "text encoder alone": (
        lambda t: {
            f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{d}.weight": torch.ones(s)
            for d, s in (("down", (4, 64)), ("up", (64, 4)))
        },
        "without a LoRA that diffusers can read into a StableDiffusionPipeline",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_kohya_file_is_refused(case: str, bare: Callable[[str], Policy], tmp_path: Path) -> None:
    policy, (damage, message) = bare("sd"), BROKEN[case]
    pair = {f"{KOHYA_LAYER}.lora_{d}.weight": torch.ones(s) for d, s in (("down", (4, 128)), ("up", (128, 4)))}
    save_file(damage(pair | {f"{KOHYA_LAYER}.alpha": torch.tensor(4.0)}), tmp_path / "style.safetensors")
    before = output(policy)
    with pytest.raises(ValueError, match=message) as error:
        policy.load_adapter(tmp_path / "style.safetensors")
    assert str(tmp_path / "style.safetensors") in str(error.value) and "\n" not in str(error.value)
    assert not any("lora" in name for name, _ in policy.network.named_parameters())
    assert not lora.layers(policy.pipe.text_encoder)
    assert torch.equal(output(policy), before)


@pytest.mark.parametrize(
    "prefix", ["lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_transformer_blocks_0_attn_to_q"]
)
def test_a_kohya_file_of_sd3_is_refused_as_diffusers_has_no_converter(
    prefix: str, bare: Callable[[str], Policy], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    pair = {f"{prefix}.lora_down.weight": torch.ones(4, 192), f"{prefix}.lora_up.weight": torch.ones(192, 4)}
    save_file(pair | {f"{prefix}.alpha": torch.tensor(4.0)}, tmp_path / "style.safetensors")
    policy = bare("sd3")
    capfd.readouterr()
    with pytest.raises(ValueError, match="without a LoRA that diffusers can read into a StableDiffusion3Pipeline"):
        policy.load_adapter(tmp_path / "style.safetensors")
    assert not lora.layers(policy.network)
    assert not capfd.readouterr().err


def test_a_matrix_without_its_partner_is_refused(
    bare: Callable[[str], Policy], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """diffusers would leave the missing one at zero, with a warning."""
    tensors = load_file(tiny_checkpoint("sd") / DIFFUSERS)
    for letter in "AB":
        lost = next(key for key in tensors if key.endswith(f"lora_{letter}.weight"))
        save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / DIFFUSERS)
        with pytest.raises(ValueError, match=re.escape(f"does not fit this base model: no weights for {lost}")):
            bare("sd").load_adapter(tmp_path)


# --- the hub


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Path | bytes]], Path]:
    """Put files into an empty hub cache, in its layout: blobs, snapshots of links to them, and a reference."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def put(repo: str, files: dict[str, Path | bytes]) -> Path:
        folder, revision = cache / f"models--{repo.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
        for name in ("refs", "blobs"):
            (folder / name).mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision)
        for i, (name, content) in enumerate(files.items()):
            blob, link = folder / "blobs" / f"{i:064x}", folder / "snapshots" / revision / name
            blob.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return folder / "snapshots" / revision

    return put


def test_a_hub_id_is_its_repository(
    publish: Callable, bare: Callable[[str], Policy], tiny_checkpoint: Callable[[str], Path]
) -> None:
    policy, folder = bare("sd"), tiny_checkpoint("sd")
    expected = attached(policy, folder)
    weights, config, single = folder / PEFT, folder / "adapter/adapter_config.json", folder / DIFFUSERS
    publish("a/peft", {"adapter_model.safetensors": weights, "adapter_config.json": config, "README.md": b"#"})
    publish("a/ours", {PEFT: weights, "adapter/adapter_config.json": config, DIFFUSERS: single})
    publish("a/named", {DIFFUSERS: single, "other.safetensors": b""})
    publish(REPO, {"my_style.safetensors": single, "my_style.bin": b"\x80"})
    publish("a/several", {"deep/one.safetensors": single, "two.safetensors": single, "three.safetensors": b""})
    assert torch.equal(attached(policy, REPO), expected)
    same = [t.flatten().tolist() for t in load_file(single).values()]
    inside = ("a/several/two.safetensors", "a/several/deep/one.safetensors", "a/several/deep", "a/ours/adapter")
    for name in ("a/peft", "a/ours", "a/named", *inside):
        assert sorted(t.flatten().tolist() for t in adapter_files.read(name).tensors.values()) == sorted(same), name
    assert adapter_files.read("a/peft").base == adapter_files.read(folder).base
    assert adapter_files.read(REPO).base is None


def test_hub_ids_that_cannot_be_used(
    publish: Callable, bare: Callable[[str], Policy], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    publish("a/several", {"two.safetensors": b"", "three.safetensors": b""})
    publish("a/pickles", {"pytorch_lora_weights.bin": b"\x80\x04."})
    publish("a/other", {DIFFUSERS: tiny_checkpoint("sd3") / DIFFUSERS})
    publish("a/cut", {DIFFUSERS: b"cut"})
    publish("a/half", {"adapter_model.safetensors": tiny_checkpoint("sd") / PEFT})
    (tmp_path / "runs").mkdir()
    policy = bare("sd")
    cases = {
        "a/several": "a/several holds three.safetensors, two.safetensors; say which: a/several/three.safetensors",
        "a/several/four.safetensors": "no such checkpoint: a/several on the hub holds no four.safetensors",
        "a/pickles": "a/pickles holds pytorch_lora_weights.bin, a pickle, and no safetensors",
        "a/pickles/pytorch_lora_weights.bin": "a/pickles/pytorch_lora_weights.bin is a pickle, which can run code",
        "a/other": "does not fit this base model: transformer_blocks.0.attn",
        "a/cut": f"{DIFFUSERS} is damaged or cut short",
        "a/half": "adapter_config.json is missing",
        "a/nothing": "no such checkpoint: a/nothing is not here, and of the hub: ",
        "a/nothing/x.safetensors": "no such checkpoint: a/nothing is not here, and of the hub: ",
        "runs/checkpoint-7": "no such checkpoint: runs/checkpoint-7",
        "nothing": "no such checkpoint: nothing",
        "../a/named": "no such checkpoint: ../a/named",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            policy.load_adapter(name)
        assert "\n" not in str(error.value)
        assert not lora.layers(policy.network)
    assert not hub.is_id("runs/checkpoint-7") and hub.is_id("a/nothing") and not hub.is_id(tmp_path)


def test_only_what_is_needed_is_downloaded(
    bare: Callable[[str], Policy],
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(tiny_checkpoint("sd"), there)
    (there / "optimizer.bin").write_bytes(b"\x80")
    (there / "unet").mkdir()
    (there / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"large")
    asked: list[str] = []

    def download(repo: str, name: str) -> str:
        assert repo == REPO
        asked.append(name)
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(there / name, here / name)

    names = [f.relative_to(there).as_posix() for f in there.rglob("*") if f.is_file()]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    policy = bare("sd")
    expected = attached(policy, there)
    assert torch.equal(attached(policy, REPO), expected)
    assert sorted(asked) == ["adapter/adapter_config.json", PEFT]
    asked.clear()
    assert torch.equal(attached(policy, f"{REPO}/{DIFFUSERS}"), expected)
    assert asked == [DIFFUSERS]


def test_sample_takes_a_hub_id(
    publish: Callable, tiny_checkpoint: Callable[[str], Path], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    publish(REPO, {DIFFUSERS: tiny_checkpoint("sd") / DIFFUSERS})
    small = ["--prompt", "a red circle", "--k", "1", "--steps", "1", "--w", "0", "2", "--output", "grid.png"]
    sample.main(["--tuned", REPO, "--base", str(tiny_folder("sd")), *small])
    assert (tmp_path / "grid.png").is_file()
