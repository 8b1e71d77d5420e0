"""SIGKILL at any moment: what is resumed ends like what was never killed, bit for bit (by tests.support.killing)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.killing import SAVE_STEPS
from tests.support.paths import ROOT

TIMEOUT = 1500  # seconds; the fast ones take some 30 on a free core
# In turn, each against what the one before left: where a kill is most dangerous.
DANGEROUS = {
    "grpo": [
        [r"os.rename .*config\.yaml\.tmp", 1],  # a folder without its config
        [r"tear .*metrics\.jsonl", 1],
        [r"tear .*checkpoint-2\.tmp/trainer_state/lora", 1],  # half a file in the first checkpoint
        [r"os.rename .*\.checkpoint-2\.tmp .*/checkpoint-2", 1],  # complete, but for its name
        [r"tear .*checkpoint-4\.tmp/.*optimizer", 1],
        [r"os.remove state\.json", 1],  # in the one that makes room
        [r"os.rename .*metrics\.jsonl\.tmp", 1],  # while resuming
    ],
    "evaluate": [
        [r"os.rename .*meta\.json\.tmp", 1],
        [r"tear .*scores-0", 2],  # some of a unit's rows, and a part of one
        [r"os.rename .*/\.scores\.jsonl\.tmp", 2],  # all done, but not joined
        [r"os.remove .*scores-0\.jsonl", 1],  # joined, and still there
    ],
}


@pytest.fixture
def survived(
    tiny_folder: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    pairs_folder: Path,
    tmp_path: Path,
) -> Callable[..., list[dict[str, Any]]]:
    """Run tests/support/killing.py with some arguments; returns a row for each chain of kills."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        script = [sys.executable, "-m", "tests.support.killing"]
        places = map(str, (tiny_folder("sd3"), tiny_checkpoint("sd3"), pairs_folder, tmp_path))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (tmp_path / "log.txt").open("w") as log:
            done = subprocess.run(
                [*script, *places, *arguments], env=environment, stdout=log, stderr=log, timeout=TIMEOUT
            )
        assert done.returncode == 0, (tmp_path / "log.txt").read_text()[-5000:]
        return json.loads((tmp_path / "results.json").read_text())

    return run


def check(chain: dict[str, Any]) -> None:
    assert chain["code"] == 0 and not chain["differ"] and not chain["left"], chain
    assert chain["lost"] <= SAVE_STEPS, chain


def test_kills_at_dangerous_moments(survived: Callable[..., list[dict[str, Any]]]) -> None:
    chains = survived("--at", json.dumps(DANGEROUS))
    assert [chain["died"] for chain in chains] == [len(kills) for kills in DANGEROUS.values()]
    for chain in chains:
        check(chain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "kills"), [(("grpo", "spo", "evaluate"), 30), (("dpo", "online_dpo", "nft", "rwr", "spm"), 20)]
)
def test_kills_at_random_moments(
    kinds: tuple[str, ...], kills: int, survived: Callable[..., list[dict[str, Any]]]
) -> None:
    chains = survived("--random", str(kills), "--seed", "0", "--kinds", *kinds)
    assert sum(chain["died"] for chain in chains) >= kills
    assert {chain["job"] for chain in chains} == set(kinds)
    for chain in chains:
        check(chain)
