"""Ten steps of a trainer on a random model, against recorded losses and gradient norms: has the arithmetic changed?

    pytest tests/test_golden.py --record-golden        writes tests/golden/ anew; only for a reason (CONTRIBUTING.md)

Adam's epsilon is large here: with the usual one, a gradient that is zero up to rounding takes a full step in a random
direction, and rounding differs between machines. As it is, weights that differ by 1e-6 give losses within 1e-4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainers.online import OnlineTrainer

FOLDER = Path(__file__).parent / "golden"
RECORDED = ("loss", "grad_norm", "kl")
SETTINGS = {
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_ten_steps(
    algorithm: str, kind: str, tiny_online: Callable[..., OnlineTrainer], request: pytest.FixtureRequest
) -> None:
    trainer = tiny_online(algorithm, kind, **{"learning_rate": 3e-3, "adam_epsilon": 1e-4} | SETTINGS[algorithm])
    rows = [trainer.iteration() for _ in range(10)]
    found = {name: [float(f"{row[name]:.6g}") for row in rows] for name in RECORDED if name in rows[0]}
    file = FOLDER / f"{algorithm}_{kind}.json"
    if request.config.getoption("record_golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(file.read_text())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-7), name
