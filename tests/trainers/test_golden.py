"""Some steps of a trainer on a random model, against recorded losses and gradient norms: has the arithmetic changed?

    pytest tests/*/test_golden*.py --record-golden       writes tests/golden/ anew; only for a reason (CONTRIBUTING.md)
    pytest tests/*/test_golden*.py --golden-rtol 1e-5    where they were recorded: a move of code changes no bit
                                                       (the ten steps, recorded on many machines, keep RTOL)

Adam's epsilon is large here: with the usual one, a gradient that is zero up to rounding takes a full step in a random
direction, and rounding differs between machines. As it is, weights that differ by 1e-6 give losses within 1e-4.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import options, run
from tests.support.golden import RTOL, Golden, read_json, read_lines
from tests.support.paths import GOLDEN
from trainers.core.online import OnlineTrainer

RECORDED = ("loss", "grad_norm", "kl")
SETTINGS = {
    # the tail is not masked: which sample is masked may hang on rounding
    "adjoint_matching": {"beta": 1e-4, "mask_quantile": 1.0, "learning_rate": 3e-4},
    "draft": {"num_grad_steps": 2, "kl_coef": 1.0},
    "grpo": {"beta": 1.0},
    "nft": {"kl_coef": 0.1, "num_train_steps": 2, "old_decay_rate": 0.1},
    "spo": {
        "learning_rate": 3e-4,  # at 3e-3 all ratios are soon beyond the clip, without gradient
        "divert_start_step": 0,
        "divert_end_step": 2,
        "num_candidates": 3,
        "threshold": 0.0,
        "pairs_per_update": 4,
        "epsilon": 0.5,
    },
}


EVERY = {
    "name": "run",
    "dtype": "float32",
    "batch_size": 4,
    "learning_rate": 3e-3,
    "cfg": 1.0,
    "max_steps": 3,
}
LORA = EVERY | {
    "lora_rank": 2,
    "lora_alpha": 4,
    "steps": 3,
    "adam_epsilon": 1e-4,
    "ema_decay": 0.0,
    "sample_steps": 0,
}
ONLINE = LORA | {
    "reward": "brightness",
    "prompts": "tinyworld:composition/train",
    "num_prompts": 2,
    "num_generations": 2,
}
PAIRS = ("dpo", "spm")  # are trained on pairs that exist
COMMANDS = {  # what trains, and with which options
    "dpo": ("train_dpo", LORA | {"beta": 20.0, "caption_dropout": 0.5}),
    "online_dpo": ("train_dpo", ONLINE | {"beta": 20.0, "caption_dropout": 0.5}),
    "rwr": ("train_rwr", ONLINE | {"beta": 0.003, "num_train_steps": 2}),
    "spm": (
        "train_spm",
        EVERY
        | {"learning_rate": 1e-4, "clip": "tiny", "accumulation_steps": 1}
        | {"test_split": "train", "test_pairs": 4, "test_bins": 2},
    ),
}


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_ten_steps(
    algorithm: str,
    kind: str,
    tiny_online: Callable[..., OnlineTrainer],
    golden: Golden,
) -> None:
    trainer = tiny_online(algorithm, kind, **{"learning_rate": 3e-3, "adam_epsilon": 1e-4} | SETTINGS[algorithm])
    rows = [trainer.iteration() for _ in range(10)]
    found = {name: [float(f"{row[name]:.6g}") for row in rows] for name in RECORDED if name in rows[0]}
    file = GOLDEN / f"{algorithm}_{kind}.json"
    if golden.record:
        file.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(file.read_text())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=RTOL, abs=1e-7), name


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("algorithm", COMMANDS)
def test_three_steps_of_a_command(
    algorithm: str,
    kind: str,
    tiny_folder: Callable[[str], Path],
    pairs_folder: Path,
    tmp_path: Path,
    golden: Golden,
) -> None:
    """All metrics of its metrics.jsonl, and what it measures at the end."""
    script, settings = COMMANDS[algorithm]
    settings = {"base": tiny_folder(kind), "output_dir": tmp_path} | settings
    settings |= {"data": pairs_folder} if algorithm in PAIRS else {}
    run(script, [*options(**settings), *(["--online"] if algorithm == "online_dpo" else [])])
    found = {"metrics": read_lines(tmp_path / "run" / "metrics.jsonl")}
    assert len(found["metrics"]) == 3
    measured = tmp_path / "run" / "accuracy.json"
    golden.check(f"{algorithm}_{kind}", found | ({"accuracy": read_json(measured)} if measured.is_file() else {}))
