"""Loaders on thousands of spoilt files: each is taken, or refused in one line, and nothing outside its folder changes.

Cases are those of hypothesis, derived from its own hash of a test alone: the same every time.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import HTTPException
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from rewards import RewardMix, ServerError
from rewards.remote import ask
from rewards.server.app import Limits, _score
from rewards.server.client import Server
from rewards.server.wire import from_pngs
from rlg.equivalence.experiment import COMMAND as EQUIVALENCE
from rlg.evaluation import options as evaluation_options
from rlg.evaluation.rows import read_rows
from rlg.io.optimizer_state import load_optimizer, save_optimizer
from rlg.io.parsing import read_yaml
from rlg.io.run_folder import run_settings
from rlg.models import adapter_files
from rlg.models.loading import check_configs
from rlg.reports import comparison_data
from rlg.reports.evaluation_data import read_run
from rlg.runs.sweep_folder import history, read_metrics, read_sweep
from rlg.runs.sweep_runner import read_file
from rlg.tasks import prompt_sets
from tests.support.hostile import YAML_VALUES, refused, spoilt, spoilt_json
from tests.support.smooth_rewards import brightness
from trainers.checkpoints.checkpoint import DAMAGED, read_state, truncate_metrics
from trainers.core.config import parse_config
from trainers.data.preference_formats import FORMATS, MapPairs, _Unusable, decode
from trainers.dpo import DPOConfig
from trainers.grpo import GRPOConfig

FEWEST = 2000  # cases over all loaders


def row(**changes: Any) -> dict[str, Any]:
    return {
        **{
            "prompt_id": 0,
            "prompt": "a cat",
            "tag": None,
            "k": 0,
            "seed": 0,
            "w": 1.0,
            "sampler": "sde",
            "mode": "rlg",
        },
        **{"rewards": {"fit": 0.5}, "kl": 1.0, "diversity": 0.1, "nfe": 8, "seconds": 0.1},
    } | changes


META = {"base": "tiny", "adapter": "a", "name": "a", "trained_rewards": ["fit"], "steps": 4, "schedule": "constant"}
LORA = {
    **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "bias": "none", "task_type": None},
    **{
        "rank_pattern": {"a": 2},
        "alpha_pattern": {"a": 4.0},
        "base_model_name_or_path": "tiny",
        "megatron_config": None,
    },
    **{"init_lora_weights": True, "modules_to_save": None, "layers_pattern": None, "use_dora": False},
}
TENSORS = {"a.to_q.lora_A.weight": torch.ones(2, 4), "a.to_q.lora_B.weight": torch.zeros(4, 2)}
HEADER = {f"unet.{name}": LORA[name] for name in ("r", "lora_alpha", "target_modules", "rank_pattern")}
GRPO = {
    **{"base": "tiny-sd3", "name": "x", "reward": ["composition"], "reward_weights": [1.0], "prompts": "p.txt"},
    **{"learning_rate": 1e-4, "max_steps": 3, "resolution": 64, "resume": False, "lora_targets": ["to_q"]},
    **{"num_prompts": 2, "num_generations": 4, "batch_size": 8, "kernel": "sde", "beta": 0.1},
}
SWEEP = {
    **{"method": "random", "program": "train_grpo.py", "metric": {"name": "reward", "goal": "maximize"}, "run_cap": 2},
    **{"parameters": {"beta": {"min": 0.1, "max": 1.0}, "seed": {"values": [1, 2]}}, "command": ["${program}"]},
}
RUN = {
    "name": "run-000",
    "parameters": {"beta": 0.1},
    "status": "finished",
    "metric": 1.0,
    "seconds": 1.0,
    "error": "",
}
EXPERIMENT = {
    **{"base": "tiny-sd3", "reward": "composition", "ckpt": "c", "beta": 0.1, "scales": [0.0, 1.0, 2.0], "steps": 4},
    **{"trained": [{"ckpt": "c", "beta": 0.2, "name": "n"}]},
}
EVALUATION = {
    "ckpt": "nowhere/c",
    "scales": [0, 1],
    "cfg": 2.0,
    "steps": 4,
    "sampler": "sde",
    "rewards": ["composition"],
}
COMPONENT = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [32, 64], "num_layers": 2}
STATE = {"step": 3, "base": "tiny", "ema_steps": 2, "counters": {"images": 4, "seconds": 1.5}, "processes": 1}


def png(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


PICTURE = Image.linear_gradient("L").resize((9, 7)).convert("RGB")
SCORING = {"images": [base64.b64encode(png(PICTURE)).decode()], "prompts": ["a cat"], "metadata": [{"n": 1}]}


def reply(data: bytes, headers: dict[str, str] | None = None) -> Server:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=data, headers=headers)

    return Server("http://far.example:1", sleep=lambda _: None, transport=httpx.MockTransport(answer))


def adam() -> torch.optim.Optimizer:
    weights = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weights])
    weights.grad = torch.ones(2, 3)
    optimizer.step()
    return optimizer


def optimizer_file(folder: Path) -> bytes:
    save_optimizer(adam(), folder / "o.safetensors")
    return (folder / "o.safetensors").read_bytes()


def in_header(data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return save(TENSORS, metadata={"lora_adapter_metadata": text})


# --- loaders: (folder, spoilt file) -> None


def prompt_file(folder: Path, data: bytes) -> None:
    (folder / "p.jsonl").write_bytes(data)
    prompt_sets.load(str(folder / "p.jsonl"))


def text_prompts(folder: Path, data: bytes) -> None:
    (folder / "p.txt").write_bytes(data)
    prompt_sets.load(str(folder / "p.txt"))


def any_yaml(folder: Path, data: bytes) -> None:
    (folder / "c.yaml").write_bytes(data)
    read_yaml(folder / "c.yaml")


def grpo_config(folder: Path, data: bytes) -> None:
    (folder / "c.yaml").write_bytes(data)
    with suppress(SystemExit):  # a clean end: argparse found a value of the wrong type
        parse_config(GRPOConfig, ["--config", str(folder / "c.yaml")]).derived(1)


def dpo_config(folder: Path, data: bytes) -> None:
    (folder / "c.yaml").write_bytes(data)
    with suppress(SystemExit):
        parse_config(DPOConfig, ["--config", str(folder / "c.yaml")]).derived(1)


def checkpoint_config(folder: Path, data: bytes) -> None:
    (folder / "config.yaml").write_bytes(data)
    run_settings(folder)


def evaluation_config(folder: Path, data: bytes) -> None:
    (folder / "c.yaml").write_bytes(data)
    with suppress(SystemExit):
        args = evaluation_options.completed(["--config", str(folder / "c.yaml"), "--method", "rlg"])
        evaluation_options.settings_of(args, full=False)


def experiment(folder: Path, data: bytes) -> None:
    (folder / "c.yaml").write_bytes(data)
    with suppress(SystemExit):
        EQUIVALENCE.parse(["--config", str(folder / "c.yaml")]).settings([0.0], 1, 0)


def sweep_file(folder: Path, data: bytes) -> None:
    (folder / "s.yaml").write_bytes(data)
    read_file(folder / "s.yaml")


def sweep_folder(folder: Path, data: bytes) -> None:
    (folder / "sweep.json").write_bytes(data)
    sweep = read_sweep(folder)
    assert all((folder / run.name).resolve().parent == folder.resolve() for run in sweep.runs)
    sweep.best()


def metrics(folder: Path, data: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(data)
    read_metrics(folder / "metrics.jsonl")
    history(folder, "reward")
    truncate_metrics(folder / "metrics.jsonl", 2)


def summary(folder: Path, data: bytes) -> None:
    (folder / "summary.json").write_bytes(data)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    history(folder, "best/fit")


def rows(folder: Path, data: bytes) -> None:
    (folder / "scores.jsonl").write_bytes(data)
    (folder / "meta.json").write_text(json.dumps(META))
    read_rows(folder / "scores.jsonl")


def summaries(folder: Path, data: bytes) -> None:
    """Rows as they are read, through all of their statistics."""
    rows(folder, data + b"\n" + json.dumps(row(k=7, w=0.0)).encode())
    read_run(folder)


def meta(folder: Path, data: bytes) -> None:
    (folder / "scores.jsonl").write_text("".join(json.dumps(row(w=w)) + "\n" for w in (0.0, 1.0)))
    (folder / "meta.json").write_bytes(data)
    found = comparison_data.collect([folder])
    [comparison_data.best_of(run) for run in found.evaluations]
    comparison_data.planes(found.evaluations)


def training_run(folder: Path, data: bytes) -> None:
    (folder / "config.yaml").write_bytes(data)
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.7}\n')
    found = comparison_data.collect([folder])
    assert found.swept == [] and found.ranked()


def state(folder: Path, data: bytes) -> None:
    (folder / "state.json").write_bytes(data)
    read_state(folder)


def optimizer(folder: Path, data: bytes) -> None:
    (folder / "o.safetensors").write_bytes(data)
    try:
        load_optimizer(adam(), folder / "o.safetensors")
    except DAMAGED as error:  # as `resume` turns them into ValueErrors
        raise ValueError(str(error)) from error


def lora_config(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(save(TENSORS))
    (folder / "adapter_config.json").write_bytes(data)
    adapter = adapter_files.read(folder)
    adapter_files.check_fit(NETWORK, adapter)


def lora_weights(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    adapter_files.check_fit(NETWORK, adapter_files.read(folder))


def lora_file(folder: Path, data: bytes) -> None:
    (folder / "x.safetensors").write_bytes(data)
    adapter_files.check_fit(NETWORK, adapter_files.read(folder / "x.safetensors"))


def lora_header(folder: Path, data: bytes) -> None:
    lora_file(folder, in_header(data))


def pipeline_configs(folder: Path, data: bytes) -> None:
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet" / "config.json").write_bytes(data)
    check_configs(folder)


def request_png(folder: Path, data: bytes) -> None:
    from_pngs([base64.b64encode(data).decode()], 100)


def preference_image(folder: Path, data: bytes) -> None:
    with suppress(_Unusable):
        assert decode(data).mode == "RGB"


def preference_row(folder: Path, data: bytes) -> None:
    """A row as `datasets` hands it over: of any type."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    (folder / "a.png").write_bytes(png(PICTURE))
    if isinstance(values, dict):
        with suppress(ValueError):  # not a single usable pair
            MapPairs(Rows([values]), FORMATS[3], folder, verify=True)


class Rows(list):
    """As much of a dataset as `MapPairs` reads."""

    def select_columns(self, names: list[str]) -> Rows:
        return Rows([{name: values.get(name) for name in names} for values in self])

    def iter(self, batch_size: int) -> list[dict[str, list[Any]]]:
        return [{name: [values[name] for values in self] for name in self[0]}]


def answer_of_remote(folder: Path, data: bytes) -> None:
    ask(reply(data), torch.zeros(1, 3, 4, 4), ["a"], [{}])


def answer_of_vlm(folder: Path, data: bytes) -> None:
    from rewards import vlm

    server = reply(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = vlm.VLM(vlm.QWEN, server, "m")._ask(torch.zeros(3, 4, 4), "a")
    vlm.read_score(vlm.QWEN, score)


def scoring_request(folder: Path, data: bytes) -> None:
    try:
        _score(RewardMix({"brightness": brightness}, (1.0,)), data, Limits(images=4, pixels=100))
    except HTTPException as error:
        assert 400 <= error.status_code < 500, "the server blames itself"
        json.dumps(error.detail).encode()


NETWORK = torch.nn.ModuleDict(
    {"a": torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)})}
)


@dataclass(frozen=True)
class Loader:
    """A loader, how many spoilt files it is given, and of what."""

    run: Callable[[Path, bytes], None]
    cases: int
    files: Callable[[Path], st.SearchStrategy[bytes]]


def objects(run: Callable[[Path, bytes], None], cases: int, value: Any) -> Loader:
    return Loader(run, cases, lambda _: spoilt_json(value))


def yamls(run: Callable[[Path, bytes], None], cases: int, value: Any) -> Loader:
    return Loader(run, cases, lambda _: spoilt_json(value, YAML_VALUES))  # JSON is YAML too


def binaries(run: Callable[[Path, bytes], None], cases: int, data: bytes) -> Loader:
    return Loader(run, cases, lambda _: spoilt(data))


LOADERS = (
    objects(prompt_file, 120, {"prompt": "a cat", "tag": "t", "include": [{"class": "cat", "count": 1}]}),
    binaries(text_prompts, 60, "a cat\nein Hund – braun\n".encode()),
    yamls(any_yaml, 120, {"a": 1, "b": {"c": [1, "x"]}}),
    yamls(grpo_config, 90, GRPO),
    yamls(dpo_config, 60, {"base": "tiny-sd3", "name": "x", "dataset": "d", "learning_rate": 1e-4, "beta": 2000}),
    yamls(checkpoint_config, 90, GRPO | {"steps": 4, "level": 0.7, "cfg": 1.0, "dtype": "x"}),
    yamls(evaluation_config, 60, EVALUATION),
    yamls(experiment, 90, EXPERIMENT),
    yamls(sweep_file, 60, SWEEP),
    objects(sweep_folder, 120, {"config": SWEEP, "seed": 0, "runs": [RUN]}),
    objects(metrics, 90, {"step": 1, "reward": 0.5, "loss": 0.1}),
    objects(summary, 60, {"points": [{"mode": "rlg", "w": 1.0, "rewards": {"fit": {"mean": 1.0}}}]}),
    objects(rows, 120, row()),
    objects(summaries, 60, row()),
    objects(meta, 80, META | {"blend_scale": 1.0, "experts": ["a", "b"]}),
    yamls(training_run, 80, {"name": "x", "reward": ["fit"], "max_steps": 2, "beta": 0.1}),
    objects(state, 90, STATE),
    Loader(optimizer, 80, lambda folder: spoilt(optimizer_file(folder))),
    objects(lora_config, 120, LORA),
    binaries(lora_weights, 90, save({f"base_model.model.{key}": value for key, value in TENSORS.items()})),
    binaries(lora_file, 60, save({f"unet.{key}": value for key, value in TENSORS.items()})),
    objects(lora_header, 80, HEADER),
    objects(pipeline_configs, 60, COMPONENT),
    binaries(request_png, 90, png(PICTURE)),
    *(binaries(preference_image, 40, png(PICTURE, form)) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP")),
    objects(preference_row, 60, {"caption": "a", "chosen": "a.png", "rejected": "a.png"}),
    objects(answer_of_remote, 80, {"total": [0.5], "parts": {"a": [0.5]}}),
    objects(answer_of_vlm, 60, {"choices": [{"message": {"content": "<Score>3</Score>"}}]}),
    objects(scoring_request, 90, SCORING),
)


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.run.__name__)
def test_a_spoilt_file_is_taken_or_refused_in_one_line(loader: Loader, tmp_path: Path) -> None:
    said: list[str | None] = []

    @settings(
        max_examples=loader.cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(loader.files(tmp_path))
    def check(data: bytes) -> None:
        said.append(refused(lambda: loader.run(tmp_path, data), tmp_path))

    check()
    assert len(said) >= loader.cases
    assert all(text or text is None for text in said), "a refusal without a word"


def test_there_are_thousands_of_cases() -> None:
    assert sum(loader.cases for loader in LOADERS) >= FEWEST


def test_a_server_error_is_one_of_the_errors_that_end_in_one_line() -> None:
    assert issubclass(ServerError, OSError)
