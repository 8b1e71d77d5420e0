"""Memory of a training: by hand, and against what a real step on the CPU allocates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rlg.benchmark import live_memory
from rlg.benchmark.allocations import peak_allocated
from rlg.guidance.guided import with_cfg
from rlg.models import skeleton
from rlg.models.backbones import backbone_of
from rlg.models.policy import Policy
from trainers.benchmark import memory_plan
from trainers.benchmark.memory_plan import GIB, Plan
from trainers.core import dry_run
from trainers.dpo_config import DPOConfig
from trainers.grpo_config import GRPOConfig
from trainers.nft_config import NFTConfig
from trainers.spo_config import SPOConfig

# By which an estimate may miss what a real step allocates; kernels for bfloat16 on CPUs take space for themselves.
BOUND = {"float32": 0.03, "bfloat16": 0.1}
Folder = Callable[[str], Path]


def config(kind: type[Any], model: Path | str, **options: Any) -> Any:
    tiny = {"base": str(model), "name": "run", "reward": ["jpeg_compressibility"], "dtype": "float32", "lora_rank": 2}
    return kind(**tiny | {"prompts": "tinyworld:composition/train", "batch_size": 3} | options)


def planned(given: Any) -> Plan:
    return memory_plan.plan_of(skeleton.load(given.base, given.dtype, None, given.vae_dtype), given)


def numbers(folder: Path) -> int:
    """How many a folder's safetensors files hold."""
    found = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found += sum(opened.get_tensor(name).numel() for name in opened.keys())
    return found


def test_the_peak_is_that_of_live_tensors() -> None:
    known = torch.empty(1024)

    def run() -> None:
        first = torch.ones(256)  # 1 KiB
        second = first * 2  # 2 KiB
        second.view(16, 16).add_(1)  # neither a view nor a change in place takes more
        del first  # 1 KiB
        third = torch.cat([second, second, second])  # 4 KiB
        del second, third
        known.mul_(2)
        torch.zeros(768)  # 3 KiB

    assert live_memory.peak(run, [known]) == 4096


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_weights_and_lora_by_hand(family: str, tiny_folder: Folder) -> None:
    """Weights are counted in the files, the LoRA as rank times the two sizes of each matrix."""
    folder = tiny_folder(family)
    plan = planned(config(NFTConfig, folder, vae_dtype="bfloat16"))
    policy = Policy.load(str(folder))
    targets = tuple(policy.backbone.lora_targets)
    matrices = [m for name, m in policy.network.named_modules() if name.endswith(targets)]
    assert matrices and all(isinstance(matrix, torch.nn.Linear) for matrix in matrices)
    lora = 4 * sum(2 * (matrix.in_features + matrix.out_features) for matrix in matrices)
    assert (plan.lora, plan.gradient, plan.optimizer) == (lora, lora, 2 * lora)
    assert plan.lora_copies == 2 * lora  # the moving average, and the policy that samples
    buffers = sum(each.numel() for name, each in policy.network.named_buffers())
    assert numbers(folder / backbone_of(policy.pipe).denoiser_name) <= plan.denoiser / 4
    assert plan.denoiser / 4 <= numbers(folder / backbone_of(policy.pipe).denoiser_name) + buffers
    assert plan.autoencoder == 2 * numbers(folder / "vae")
    half = planned(config(NFTConfig, folder, dtype="bfloat16", ema_decay=0.0))
    assert (2 * half.denoiser, half.lora, half.lora_copies) == (plan.denoiser, lora, lora)


def measured(folder: Path, options: dict[str, Any], rows: int) -> int:
    """Bytes at the peak of a real forward and backward pass of so many samples, after a first one."""
    policy = Policy.load(str(folder), options.get("dtype", "float32"))
    parameters = policy.add_lora(2, 64)
    if options.get("gradient_checkpointing"):
        policy.network.enable_gradient_checkpointing()
    predict = with_cfg(policy.predict, policy.encode([""]), options.get("cfg", 1.0))
    x_BCHW, t_B = torch.randn(rows, *policy.latent_shape(options.get("resolution"))), torch.full((rows,), 0.5)
    cond = policy.encode(["two red circles"] * rows)

    def step() -> None:
        predict(x_BCHW, t_B, cond).float().square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    step()
    return peak_allocated(step)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd", {}),
        ("sd3", {"cfg": 4.5}),
        ("sd3", {"resolution": 32, "dtype": "bfloat16"}),
        ("sdxl", {"gradient_checkpointing": True, "cfg": 2.0}),
        ("sd3", {"gradient_checkpointing": True}),
    ],
)
def test_activations_are_near_those_of_a_real_step(family: str, options: dict[str, Any], tiny_folder: Folder) -> None:
    settings = {"cfg": 1.0} | options
    plan = planned(config(GRPOConfig, tiny_folder(family), **settings))
    real = measured(tiny_folder(family), options, rows=3)
    assert abs(plan.activations / real - 1) <= BOUND[options.get("dtype", "float32")], (plan.activations, real)


def test_decoding_is_near_a_real_one(tiny_folder: Folder) -> None:
    plan = planned(config(GRPOConfig, tiny_folder("sd3")))
    policy = Policy.load(str(tiny_folder("sd3")))
    latents = torch.randn(3, *policy.latent_shape())
    policy.decode(latents)
    assert plan.decoding == pytest.approx(peak_allocated(lambda: policy.decode(latents)), rel=BOUND["float32"])


def test_rows_that_are_trained_at_once() -> None:
    assert config(NFTConfig, "m").trained_at_once() == 3
    assert config(GRPOConfig, "m", cfg=1.0).trained_at_once() == 3
    assert config(GRPOConfig, "m", cfg=4.5, update_batch_size=6).trained_at_once() == 12
    assert config(SPOConfig, "m", cfg=1.0, compare_every=4).trained_at_once() == 6
    assert config(SPOConfig, "m", cfg=1.0, train_cfg=3.0).trained_at_once() == 6
    assert DPOConfig(base="m", name="run", data="d", batch_size=3).trained_at_once() == 6


def test_engines_share_parts_out() -> None:
    plan = Plan(
        denoiser=800,
        text_encoders=100,
        autoencoder=50,
        other_parts=10,
        lora=80,
        lora_copies=80,
        gradient=80,
        optimizer=160,
        activations=300,
        decoding=200,
    )
    assert plan.total == 800 + 100 + 50 + 10 + 80 + 80 + 80 + 160 + 300
    assert plan.sharded("data parallel", 4) == plan.total
    assert plan.sharded("ZeRO-2", 4) == plan.total - 60 - 120
    assert plan.sharded("ZeRO-3", 4) == plan.total - 600 - 60 - 60 - 120
    assert plan.sharded("FSDP2", 4) == plan.total - 600


def test_what_a_dry_run_says_of_memory_and_files(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one = config(GRPOConfig, tiny_folder("sd"), num_prompts=3, num_generations=4, dry_run=True)
    dry_run.report(one, 2)
    said = dict(
        line[2:].rsplit(": ", 1) for line in capsys.readouterr().out.splitlines() if line[:2] == "# " and ": " in line
    )
    plan = planned(one)
    assert said["denoiser"] == f"{plan.denoiser / GIB:.3g}"
    assert said["total (each of 2 processes, FSDP2)"] == f"{(plan.total - plan.denoiser // 2) / GIB:.3g}"
    assert not list(tmp_path.iterdir())
    unknown = config(
        GRPOConfig, "nobody/nothing", prompts="a.txt", eval_prompts="b.csv", num_prompts=3, num_generations=4
    )
    with pytest.raises(ValueError, match=r"^not on this machine: prompts a.txt, eval_prompts b.csv$"):
        dry_run.report(unknown, 1)
    line = [each for each in capsys.readouterr().out.splitlines() if "memory" in each]
    assert len(line) == 1 and line[0].startswith("# memory: not known, the config files of nobody/nothing are not on")
    with pytest.raises(ValueError, match="image size 30x30 is not a multiple of 8"):
        dry_run.report(replace(one, resolution=30), 1)
    (tmp_path / "a.txt").write_text("a dog\n")
    (tmp_path / "b.csv").write_text("caption\na cat\n")
    with pytest.raises(ValueError, match=r"b.csv:2: a row needs a text under `prompt`"):
        dry_run.report(unknown, 1)
    offline = DPOConfig(base="nobody/nothing", name="run", data="runs/pairs")
    with pytest.raises(ValueError, match=r"^not on this machine: data runs/pairs$"):
        (tmp_path / "runs").mkdir()
        dry_run.report(offline, 1)
