"""Full fine-tuned networks beside the base: guidance between two networks, in every form that they are released in."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import rlg
from rlg import evaluate, sample
from rlg.evaluation import evaluator
from rlg.evaluation.methods import RLG, SWEEP_METHODS, TWICE
from rlg.evaluation.rows import read_rows
from rlg.guidance import guided as guidance
from rlg.integrations.guided_network import guided
from rlg.models import full_networks, lora
from rlg.models.policy import Policy

PROMPTS = ["a red circle", "two blue crosses"]
SAME = {"rtol": 1e-4, "atol": 1e-4}  # fp32, one step; SD3's equal text tokens are passed as one
WEIGHTS = "diffusion_pytorch_model.safetensors"


def inputs(policy: Policy) -> tuple[Any, ...]:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(5))
    return x, torch.tensor([300.0, 300.0]), policy.encode(PROMPTS)


@torch.no_grad()
def images(pipe: Any) -> Tensor:
    """Latents after one step, which is linear in w."""
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"num_inference_steps": 1, "guidance_scale": 4.0, "generator": generators, "output_type": "latent"}
    return pipe(PROMPTS, **options).images


def plain(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def finetuned(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a pipeline whose network is that of `tiny_folder(family)`, moved a little; made once."""
    root = tmp_path_factory.mktemp("finetuned")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            pipe = plain(tiny_folder(family))
            torch.manual_seed(3)
            for parameter in network_of(pipe).parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
            pipe.save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture(scope="module")
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    """A tiny sd model; refused networks must leave it as it is, and what is taken is taken off again."""
    return Policy.load(str(tiny_folder("sd")))


def network_of(pipe: Any) -> torch.nn.Module:
    return getattr(pipe, name_in(pipe))


def name_in(pipe: Any) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


@pytest.mark.numerics
def test_w_mixes_two_networks(
    family: str, tiny_folder: Callable[[str], Path], finetuned: Callable[[str], Path]
) -> None:
    policy, own = Policy.load(str(tiny_folder(family))), Policy.load(str(finetuned(family)))
    x, t_B, cond = inputs(policy)
    with torch.no_grad():
        base, tuned = policy.predict(x, t_B, cond), own.predict(x, t_B, cond)
        policy.load_tuned(finetuned(family))
        assert torch.equal(policy.reference(x, t_B, cond), base)
        assert torch.equal(policy.predict(x, t_B, cond), tuned)
        guided = {w: guidance.rlg(policy.reference, policy.predict, w)(x, t_B, cond) for w in (0.0, 1.0, 2.0)}
        with policy.adapter_off():
            assert torch.equal(policy.predict(x, t_B, cond), base)
    assert torch.equal(guided[0.0], base) and torch.equal(guided[1.0], tuned)
    torch.testing.assert_close(guided[2.0], 2 * tuned - base, rtol=1e-5, atol=1e-5)
    assert (tuned - base).abs().max() > 1e-2
    assert not any(p.requires_grad for p in policy.tuned.parameters()) and not policy.tuned.training


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_slider_between_two_pipelines(
    family: str, tiny_folder: Callable[[str], Path], finetuned: Callable[[str], Path], capsys: pytest.CaptureFixture
) -> None:
    pipe = plain(tiny_folder(family))
    base, tuned = images(pipe), images(plain(finetuned(family)))
    components = dict(pipe.components)
    capsys.readouterr()
    guide = rlg.apply(pipe, finetuned(family), scale=0.0)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    count = sum(p.numel() for p in network_of(pipe).parameters())
    size = rf"{count / 1e6:.1f}M parameters \(\d+\.\d MB\)"
    assert re.fullmatch(f"two networks in memory: base {size}, tuned {size}", line)
    torch.testing.assert_close(images(pipe), base, **SAME)
    with pytest.raises(ValueError, match=r"is guided already; call unload\(\)"):
        rlg.apply(pipe, finetuned(family))
    guide.scale = 1.0
    torch.testing.assert_close(images(pipe), tuned, **SAME)
    guide.scale = lambda t: 2.0
    torch.testing.assert_close(images(pipe), 2 * tuned - base, rtol=1e-3, atol=1e-3)
    assert (tuned - base).abs().max() > 1e-2
    guide.remove()
    assert pipe.components == components and guided(network_of(pipe)) is None


def test_every_form_of_a_network_is_the_same(finetuned: Callable[[str], Path], policy: Policy, tmp_path: Path) -> None:
    whole = finetuned("sd")
    shutil.copytree(whole / "unet", tmp_path / "repository" / "unet")
    network = plain(whole).unet
    network.save_pretrained(tmp_path / "split", max_shard_size="1MB")
    network.save_pretrained(tmp_path / "variant", variant="fp16")
    network.save_pretrained(tmp_path / "both", variant="ema")
    shutil.copy(whole / "unet" / WEIGHTS, tmp_path / "both" / WEIGHTS)
    save_file({k: v * 0 for k, v in network.state_dict().items()}, tmp_path / "both" / WEIGHTS.replace(".s", ".ema.s"))
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    expected = network.state_dict()
    folders = [whole, whole / "unet", *(tmp_path / n for n in ("repository", "split", "variant", "both"))]
    for folder in folders:
        assert full_networks.is_network(folder)
        policy.load_tuned(folder)
        found, policy.tuned = policy.tuned.state_dict(), None
        assert all(torch.equal(found[k], v) for k, v in expected.items()), folder


def test_the_second_network_has_the_precision_of_the_first(
    tiny_folder: Callable[[str], Path], finetuned: Callable[[str], Path]
) -> None:
    policy = Policy.load(str(tiny_folder("sd")), "bfloat16")
    policy.load_tuned(finetuned("sd"))
    assert {p.dtype for p in policy.tuned.parameters()} == {torch.bfloat16}
    half, full = full_networks.memory(policy.network, policy.tuned), full_networks.memory(*[policy.tuned.float()] * 2)
    megabytes = [[float(n) for n in re.findall(r"\(([\d.]+) MB", line)] for line in (half, full)]
    assert megabytes[1] == pytest.approx([2 * n for n in megabytes[0]], abs=0.11)


def test_adapters_are_still_adapters(
    tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    policy = Policy.load(str(tiny_folder("sd")))
    assert not full_networks.is_network(tiny_checkpoint("sd"))
    policy.load_tuned(tiny_checkpoint("sd"))
    assert policy.tuned is None and lora.layers(policy.network)


# --- what does not fit


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / "unet" / WEIGHTS)), folder / "unet" / WEIGHTS)

    return damage


def config(file: str, **values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        row = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(row | values))

    return damage


def pickled(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin"))
    file.unlink()


def cut(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def split(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    table = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-1-of-2.safetensors"}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(table))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "in_channels": (
        weights(lambda t: t | {"conv_in.weight": torch.zeros(64, 9, 3, 3)}),
        r"unet does not fit this base model: conv_in.weight: \(64, 4, 3, 3\) against \(64, 9, 3, 3\)$",
    ),
    "width": (
        weights(lambda t: {k: v[..., :-8].contiguous() if k.endswith("to_q.weight") else v for k, v in t.items()}),
        r"does not fit this base model: .*to_q.weight: \(64, 64\) against \(64, 56\) \(and \d+ more\)$",
    ),
    "missing key": (
        weights(lambda t: {k: v for k, v in t.items() if k != "conv_out.bias"}),
        "does not fit this base model: no weights for conv_out.bias$",
    ),
    "one key more": (weights(lambda t: t | {"extra": torch.ones(1)}), "does not fit .*: no place for extra$"),
    "class": (
        config("unet/config.json", _class_name="SD3Transformer2DModel"),
        "a SD3Transformer2DModel against a UNet2",
    ),
    "config": (config("unet/config.json", act_fn="none"), "cannot load .*unet: "),
    "a count of the config": (
        config("unet/config.json", layers_per_block=10**9),
        "layers_per_block is 1000000000 against 1",
    ),
    "prediction": (
        config("scheduler/scheduler_config.json", prediction_type="v_prediction"),
        "does not fit this base model: it predicts v_prediction, the base epsilon",
    ),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), "holds no adapter"),
    "config damaged": (lambda f: (f / "unet" / "config.json").write_text("{"), "unet/config.json is damaged"),
    "config a list": (lambda f: (f / "unet" / "config.json").write_text("[1]"), "unet/config.json is damaged"),
    "no weights": (lambda f: (f / "unet" / WEIGHTS).unlink(), f"unet holds no {WEIGHTS}"),
    "a pickle": (pickled, "unet holds diffusion_pytorch_model.bin, a pickle, which can run code"),
    "cut short": (cut, f"{WEIGHTS} is damaged or cut short"),
    "a part missing": (split, "index.json names files that are missing: .*1-of-2"),
}


def refused(policy: Policy, path: Path, message: str) -> None:
    """By the policy and by a pipeline, in one line, and both are as before."""
    with torch.no_grad():
        before = policy.predict(*inputs(policy))
        for take in (policy.load_tuned, lambda path: rlg.apply(policy.pipe, path)):
            with pytest.raises(ValueError, match=message) as error:
                take(path)
            assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert torch.equal(policy.predict(*inputs(policy)), before)
    assert policy.tuned is None and guided(policy.network) is None


@pytest.mark.parametrize("case", BROKEN)
def test_a_network_that_does_not_fit_is_refused(
    case: str, finetuned: Callable[[str], Path], policy: Policy, tmp_path: Path
) -> None:
    damage, message = BROKEN[case]
    for part in ("unet", "scheduler"):
        shutil.copytree(finetuned("sd") / part, tmp_path / "theirs" / part)
    damage(tmp_path / "theirs")
    refused(policy, tmp_path / "theirs", message)


def test_another_family_is_refused(tiny_folder: Callable[[str], Path], policy: Policy) -> None:
    refused(policy, tiny_folder("sd3"), "a SD3Transformer2DModel against a UNet2DConditionModel")
    refused(policy, tiny_folder("sdxl"), "unet does not fit this base model: ")


def test_a_base_with_a_lora_is_no_base(tiny_policy: Callable[..., Policy], finetuned: Callable[[str], Path]) -> None:
    policy = tiny_policy("sd")
    with pytest.raises(ValueError, match="the unet carries a LoRA"):
        policy.load_tuned(finetuned("sd"))


# --- the commands

SMALL = ["--k", "1", "--steps", "2", "--w", "0", "1", "2"]


def test_evaluate_runs_on_two_networks(
    tiny_folder: Callable[[str], Path],
    finetuned: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Given as a hub id, whose cache holds a UNet as the Diffusion-DPO ones are released."""
    cache = tmp_path / "hub" / "models--someone--dpo-sd"
    shutil.copytree(finetuned("sd") / "unet", cache / "snapshots" / "abc" / "unet")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    base = str(tiny_folder("sd"))
    evaluate.main(["--tuned", "someone/dpo-sd", "--base", base, "--num_prompts", "2", "--cfg", "1", *SMALL])
    out, err = capsys.readouterr()
    folder = Path("runs/someone--dpo-sd/eval/dpo-sd-ode2-cfg1-seed0")
    assert out == f"{folder / 'report.html'}\n" and (folder / "report.html").is_file()
    assert len(re.findall("two networks in memory: base .* MB", err)) == 1
    points = {(p["method"], p["w"]): p for p in json.loads((folder / "summary.json").read_text())["points"]}
    assert points.keys() == {
        (RLG, 0),
        (RLG, 1),
        (RLG, 2),
        (TWICE, 1),
    }
    assert [points[RLG, w]["nfe_per_image"] for w in (0, 1, 2)] == [2, 2, 4]
    rewards = {row.w: row.rewards for row in read_rows(folder / "scores.jsonl") if row.method == RLG}
    assert rewards[0] != rewards[1] != rewards[2]
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["name"], meta["base"], meta["adapter"]) == ("someone--dpo-sd", base, "someone/dpo-sd")


def test_commands_refuse_in_one_line(
    tiny_folder: Callable[[str], Path],
    finetuned: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned, base = str(finetuned("sd")), str(tiny_folder("sd"))
    small = ["--prompt", "x", *SMALL]
    cases: list[tuple[Callable[[list[str]], None], list[str], str]] = [
        (evaluate.main, ["--tuned", tuned], "does not say what it was trained on; give --base"),
        (
            evaluate.main,
            ["--tuned", tuned, "--base", base, "--method", "lora_scale"],
            "method lora_scale scales a LoRA",
        ),
        (
            evaluate.main,
            ["--tuned", tuned, "--base", str(tiny_folder("sdxl")), *SMALL],
            "does not fit this base model",
        ),
        (sample.main, ["--tuned", tuned, *small], "does not say what it was trained on; give --base"),
        (sample.main, ["--tuned", tuned, "--base", str(tiny_folder("sdxl")), *small], "does not fit this base model"),
    ]
    for command, arguments, message in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command(arguments)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.iterdir())


def test_an_evaluator_refuses_what_its_policy_has_not(finetuned: Callable[[str], Path], policy: Policy) -> None:
    policy.load_tuned(finetuned("sd"))
    try:
        with pytest.raises(ValueError, match="method lora_scale scales a LoRA"):
            evaluator.Evaluator(
                policy, None, [], evaluator.EvalSettings((0.0,), SWEEP_METHODS, 1, "ode", 0, 1, None, 1, 0, 1)
            )
        settings = evaluator.EvalSettings(
            (0.0,), SWEEP_METHODS[:1], 1, "ode", 0, 1, None, 1, 0, 1, origin="lora_old.safetensors"
        )
        with pytest.raises(ValueError, match="is a full network, which has no second adapter"):
            evaluator.Evaluator(policy, None, [], settings)
    finally:
        policy.tuned = None
    assert evaluator.methods_of(None, full=True) == (RLG, TWICE)
    assert evaluator.methods_of(None, full=False) == SWEEP_METHODS[:3]
