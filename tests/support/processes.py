"""Training and evaluation on several processes: what test_distributed*.py share."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from rewards import RewardMix
from tests.support.paths import ROOT
from tests.support.smooth_rewards import brightness

TIMEOUT = 900  # seconds; a start takes some 30 on two free cores
EVERY_TRAINER = {
    "reward": "jpeg_compressibility",
    "dtype": "float32",
    "lora_rank": 2,
    "lora_alpha": 4,
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-4,  # large, for what test_golden.py says
    "steps": 3,
    "cfg": 1.0,
    "sample_steps": 0,
}
GRPO = {"num_prompts": 2, "num_generations": 4, "batch_size": 2, "beta": 1.0, "ema_every": 1}
DPO = {"beta": 20.0, "caption_dropout": 0.5, "ema_every": 1}


def options(**settings: Any) -> list[str]:
    """Settings as arguments of a command."""
    return [item for name, value in settings.items() for item in (f"--{name}", str(value))]


def train(script: str, argv: Sequence[str]) -> None:
    """What a `train_*.py` does with these arguments, for a reward that is smooth (a JPEG's size comes in bytes)."""
    smooth = RewardMix({"brightness": brightness}, (1.0,))
    with patch("sys.argv", [f"{script}.py", *argv]), patch("rewards.build", return_value=smooth):
        importlib.import_module(script).main()


@contextmanager
def started(launcher: Sequence[str], worker: str, arguments: Any, folder: Path, **environment: str) -> Iterator[None]:
    """Within, `module:function` runs on the processes that `python -m LAUNCHER` starts; they must end well."""
    module, function = worker.split(":")
    code = f"import json, sys; from {module} import {function}; {function}(*json.loads(sys.argv[1]))"
    (folder / "worker.py").write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", *launcher, str(folder / "worker.py"), json.dumps(arguments)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield
            assert process.wait(TIMEOUT) == 0, (folder / "log.txt").read_text()[-5000:]
        finally:
            process.terminate()  # the launcher ends its workers
            process.wait(60)


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run, without how long things took."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def assert_same_metrics(one: Path, other: Path, unseen: Collection[str] = ()) -> None:
    """Two runs went the same way, but for the order of their sums; `unseen`: metrics that the other one has not."""
    ours, theirs = metrics(one), metrics(other)
    ours = [{name: value for name, value in row.items() if name not in unseen} for row in ours]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, expected in zip(theirs, ours, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
