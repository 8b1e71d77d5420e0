"""The share of a run's first gradient that is 0: what counts, what every trainer logs, and float16 refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from trainers.checkpoints import engines
from trainers.core.online import OnlineTrainer
from trainers.core.setup import make_accelerator
from trainers.core.zero_gradients import ADAPTER, OUTPUT, ZeroGradients, live

CPU = SimpleNamespace(
    mixed_precision="no", device=torch.device("cpu"), is_main_process=True, reduce=lambda values, how: values
)


def output_share(gradient: list[list[float]], dtype: torch.dtype) -> dict[str, float]:
    """What is reported of an output that gets this gradient."""
    zeros = ZeroGradients(CPU, dtype)  # type: ignore[arg-type]
    out = torch.zeros(len(gradient), len(gradient[0]), requires_grad=True) * 1.0
    zeros.watch(out)
    (out * torch.tensor(gradient)).sum().backward()
    zeros.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zeros.report()


def test_zeros_are_those_of_the_networks_precision() -> None:
    """float16 ends at 6e-8, half of whose smallest step is rounded to 0; bfloat16 has float32's range."""
    gradient = [[1e-3, 1e-9, 2e-8, 1e-6]]
    assert output_share(gradient, torch.float32) == {OUTPUT: 0.0}
    assert output_share(gradient, torch.bfloat16) == {OUTPUT: 0.0}
    assert output_share(gradient, torch.float16) == {OUTPUT: 0.5}


def test_samples_without_any_gradient_do_not_count_unless_there_is_no_other() -> None:
    assert output_share([[1.0, 0.0], [0.0, 0.0]], torch.float32) == {OUTPUT: 0.5}
    assert output_share([[0.0, 0.0]], torch.float32) == {OUTPUT: 1.0}


def test_only_the_first_update_counts_and_once() -> None:
    zeros = ZeroGradients(CPU, torch.float32)  # type: ignore[arg-type]
    parameter = torch.nn.Parameter(torch.zeros(4))
    assert zeros.report() == {}  # none was made
    parameter.grad = torch.tensor([1.0, 0.0, 0.0, 0.0])
    zeros.close([parameter])
    parameter.grad = torch.zeros(4)
    zeros.close([parameter])
    with pytest.warns(UserWarning, match=r"100% \(zero_gradient_output\) and 75% \(zero_gradient\) .* exactly 0"):
        assert zeros.report() == {OUTPUT: 1.0, ADAPTER: 0.75}
    assert zeros.report() == {}
    resumed = ZeroGradients(CPU, torch.float32)  # type: ignore[arg-type]
    resumed.skip()
    assert resumed.report() == {}


def test_factors_that_have_no_gradient_by_construction_do_not_count(tiny_policy: Callable[..., Any]) -> None:
    fresh, trained = tiny_policy("sd3", fresh=True), tiny_policy("sd3")
    assert len(live(trained.network, trained.trainable())) == len(trained.trainable())
    names = {id(parameter): name for name, parameter in fresh.network.named_parameters()}
    kept = [names[id(parameter)] for parameter in live(fresh.network, fresh.trainable())]
    assert 2 * len(kept) == len(fresh.trainable()) and all(".lora_B." in name for name in kept)


@pytest.mark.parametrize("algorithm", ["grpo", "nft", "rwr", "online_dpo", "spo"])
def test_every_trainer_logs_it_in_its_first_update(
    algorithm: str, tiny_online: Callable[..., OnlineTrainer], tmp_path: Path
) -> None:
    options = {"divert_start_step": 0, "threshold": 0.0} if algorithm == "spo" else {}
    trainer = tiny_online(algorithm, max_steps=2, save_steps=2, cfg=2.0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        trainer.train()
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first[OUTPUT] == 0 and first[ADAPTER] < 0.2
    assert not {OUTPUT, ADAPTER} & second.keys()


def test_a_graph_that_is_cut_is_warned_of(tiny_online: Callable[..., OnlineTrainer], tmp_path: Path) -> None:
    """A loss whose gradient never reaches the LoRA: nothing is trained, whatever the loss says."""
    trainer = tiny_online("rwr", max_steps=1)
    inner = trainer.loss

    def cut(*args: Any) -> Any:
        loss, metrics = inner(*args)
        return loss.detach() + 0 * sum(p.sum() for p in trainer.policy.trainable()), metrics

    trainer.loss = cut  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"100% \(zero_gradient\)"):
        trainer.train()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row[ADAPTER] == row[OUTPUT] == 1


def engine(kind: DistributedType, device: str, scaler: Any) -> Any:
    return SimpleNamespace(distributed_type=kind, device=torch.device(device), scaler=scaler)


ON = torch.amp.GradScaler("cpu")


@pytest.mark.parametrize(
    ("accelerator", "fix"),
    [
        (engine(DistributedType.NO, "cpu", None), "give --dtype bfloat16$"),
        (engine(DistributedType.MULTI_GPU, "cuda", None), "--mixed_precision fp16, which scales the loss, or"),
        (engine(DistributedType.FSDP, "cuda", torch.amp.GradScaler("cpu", enabled=False)), "--mixed_precision fp16"),
        (engine(DistributedType.DEEPSPEED, "cuda", None), "give --dtype bfloat16$"),
    ],
)
def test_float16_without_a_loss_scaler_is_refused(accelerator: Any, fix: str) -> None:
    with pytest.raises(ValueError, match=f"dtype is float16 and nothing scales the loss.*{fix}"):
        engines.require_scaler(accelerator, "float16")
    engines.require_scaler(accelerator, "bfloat16")


def test_float16_with_a_loss_scaler_is_taken() -> None:
    engines.require_scaler(engine(DistributedType.MULTI_GPU, "cuda", ON), "float16")


def test_a_trainer_refuses_float16_before_it_loads_a_model(tiny_online: Callable[..., OnlineTrainer]) -> None:
    with pytest.raises(ValueError, match="nothing scales the loss"):
        tiny_online("grpo", dtype="float16", base="nowhere/at-all")
    assert Accelerator(cpu=True).scaler is None  # why


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_products_are_rounded_on_gpus_alone(
    tf32: bool, tiny_online: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_online("grpo", tf32=tf32).config
    backends = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace()), cudnn=SimpleNamespace())
    monkeypatch.setattr(torch, "backends", backends)
    for device, expected in (("cpu", {}), ("cuda", {"allow_tf32": tf32})):
        made = SimpleNamespace(device=torch.device(device))
        monkeypatch.setattr(engines, "make_accelerator", lambda made=made, **_: made)
        assert make_accelerator(config) is made
        assert vars(backends.cuda.matmul) == vars(backends.cudnn) == expected
