"""Commands that are killed while they write, and started again: does the result differ from an uninterrupted one?

    python -m tests.support.killing PIPELINE CHECKPOINT PAIRS FOLDER --random 30 --seed 0    # of a tiny model

A process with everything imported forks a child for every attempt. A child ends itself by SIGKILL at a chosen event:
before a call that changes files (by Python's audit events), or within a write, of which half is on the disk. Or its
parent kills it after a time. Then the command that a user (or `rlg.sweep`) would give next is run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file, save_file
from tqdm import tqdm

import train_dpo
import train_grpo
import train_nft
import train_rwr
import train_spm
import train_spo
from rlg import evaluate
from rlg.cli import fail_cleanly
from rlg.evaluation.folder import append
from rlg.models.policy import Policy
from rlg.runs.sweep_runner import go_on
from trainers.checkpoints import checkpoint_folder
from trainers.core.log import Log

STEPS, SAVE_STEPS = 4, 2
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_EVERY = {
    "name": "run",
    "dtype": "float32",
    "batch_size": 2,
    "cfg": 1.0,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 1,
}
_POLICY = _EVERY | {"lora_rank": 2, "lora_alpha": 4, "steps": 3, "ema_every": 1, "sample_steps": 2}
_ONLINE = _POLICY | {
    "reward": "jpeg_compressibility",
    "prompts": "tinyworld:composition/train",
    "num_prompts": 2,
    "num_generations": 2,
}
_TRAIN: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {  # by kind: what trains, and with which options
    "grpo": (train_grpo.main, _ONLINE | {"num_updates": 2, "beta": 0.5, "num_train_steps": 1}),
    "spo": (
        train_spo.main,
        _ONLINE | {"divert_start_step": 0, "divert_end_step": 2, "num_candidates": 2, "threshold": 0.0},
    ),
    "nft": (train_nft.main, _ONLINE | {"num_train_steps": 2, "old_decay_rate": 0.25}),
    "rwr": (train_rwr.main, _ONLINE | {"num_train_steps": 2, "on_policy": True}),
    "online_dpo": (train_dpo.main, _ONLINE | {"beta": 20.0, "caption_dropout": 0.5}),
    "dpo": (train_dpo.main, _POLICY | {"beta": 20.0, "caption_dropout": 0.5}),
    "spm": (
        train_spm.main,
        _EVERY | {"clip": "tiny", "accumulation_steps": 1, "test_split": "train", "test_pairs": 4, "test_bins": 2},
    ),
}
_OF_PAIRS = ("dpo", "spm")
_KEPT = ("accuracy.json",)  # what training a step-aware scorer is for
_EVALUATE = "--steps 2 --kernel sde --cfg 1 --k 2 --num_prompts 4 --w 0 1 2 --batch_size 6 --images 2"


@dataclass(frozen=True)
class Kill:
    """When a child dies: at the nth event whose label matches, or after some seconds."""

    pattern: str = "."
    nth: int = 0  # from 1 on; 0: never
    seconds: float | None = None


class Watch:
    """Counts the events of a child, and ends it at one of them."""

    def __init__(self, folder: Path, kill: Kill):
        self.folder, self.kill, self.left, self.labels = str(folder), kill, kill.nth, []

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: files that are opened to be written in the folder, and what changes names."""
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and str(arguments[0]).startswith(self.folder):
            self.tick(f"{event} {arguments[0]}")
        elif event in _CHANGES:
            self.tick(f"{event} {' '.join(map(str, arguments[:2]))}")

    def tick(self, label: str, half: Callable[[], None] | None = None) -> None:
        """Count an event; if it is the last, do the half of it and die."""
        self.labels.append(label)
        self.left -= bool(re.search(self.kill.pattern, label))
        if self.kill.nth and self.left == 0:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(self, tensors: Any, path: Any, **options: Any) -> None:
        """safetensors' own, which Python does not see at work."""
        save_file(tensors, path, **options)
        self.tick(f"tear {path}", lambda: os.truncate(path, os.path.getsize(path) // 2))

    def append(self, folder: Path, rank: int, rows: Any) -> None:
        """An evaluation's rows, of which a part reaches the disk."""
        file = folder / f"scores-{rank}.jsonl"
        before = file.stat().st_size if file.exists() else 0
        _append(folder, rank, rows)
        self.tick(f"tear {file}", lambda: os.truncate(file, before + (file.stat().st_size - before) * 3 // 4))

    def metrics(self, log: Log, step: int, row: Any) -> None:
        """A row of metrics.jsonl, of which a part reaches the disk."""
        _metrics(log, step, row)
        file = log.folder / "metrics.jsonl"
        self.tick(f"tear {file}", lambda: os.truncate(file, file.stat().st_size - 9))

    def live(self, command: Callable[[], None]) -> None:
        """Run a command under watch."""
        sys.addaudithook(self.audit)
        with (
            patch("rlg.evaluation.evaluator.append", self.append),
            patch("rlg.models.adapter_files.save_file", self.save_file),
            patch("rlg.io.optimizer_state.save_file", self.save_file),
            patch("trainers.checkpoints.checkpoint.save_file", self.save_file),
            patch("rewards.step_aware.save_file", self.save_file),
            patch.object(Log, "metrics", lambda *arguments: self.metrics(*arguments)),
            fail_cleanly(),
        ):
            command()


_append, _metrics = append, Log.metrics


def attempt(command: Callable[[], None], folder: Path, kill: Kill = Kill()) -> tuple[int, list[str]]:
    """(exit code, or minus the signal, of a child that runs the command; its events, if it lived)."""
    events = folder.parent / f"{folder.name}-events.json"
    child = os.fork()
    if child == 0:
        code, watch = 70, Watch(folder, kill)
        try:
            watch.live(command)
            events.write_text(json.dumps(watch.labels))
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(child, signal.SIGKILL)  # a zombie, if it was done already
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(events.read_text()) if code == 0 else []


def _train(main: Callable[[], None], argv: list[str]) -> None:
    with patch("sys.argv", ["train.py", *argv]):
        main()


class Job:
    """A command, and what it must leave."""

    def __init__(self, kind: str, pipeline: str, checkpoint: str, pairs: str, root: Path):
        self.kind, self.pipeline, self.checkpoint, self.pairs, self.root = kind, pipeline, checkpoint, pairs, root
        self.chain = 0
        started = time.monotonic()
        code, self.events = attempt(self.command("whole"), self.folder("whole"))
        assert code == 0, f"{kind} fails uninterrupted"
        self.seconds, self.expected = time.monotonic() - started, self.result("whole")

    def folder(self, name: str) -> Path:
        """The folder of a chain of attempts."""
        return self.root / self.kind / name

    def command(self, name: str) -> Callable[[], None]:
        """The command, or the one that goes on after a kill."""
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "evaluate":
            argv = ["--ckpt", self.checkpoint, *_EVALUATE.split(), "--output", str(folder / "eval")]
            return lambda: evaluate.main(argv)
        main, own = _TRAIN[self.kind]
        options = own | {"base": self.pipeline, "output_dir": folder}
        options |= {"data": self.pairs} if self.kind in _OF_PAIRS else {}
        argv = ["--online"] if self.kind == "online_dpo" else []
        argv += [text for option, value in options.items() for text in (f"--{option}", str(value))]
        return partial(_train, main, argv + go_on(folder / "run"))

    def result(self, name: str) -> dict[str, Any]:
        """What must be equal: rows and metrics without clock times, images, and a checkpoint's tensors."""
        folder, found = self.folder(name), {}
        for file in sorted(folder.rglob("*")):
            place = str(file.relative_to(folder))
            if file.suffix == ".safetensors" and "rng" not in file.name:
                found |= {f"{place}:{key}": tensor.numpy().tobytes() for key, tensor in load_file(file).items()}
            elif file.suffix == ".jsonl":
                rows = map(json.loads, file.read_text().splitlines())
                found[place] = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]
            elif file.name in _KEPT or (file.suffix in (".png", ".txt") and file.parent.name in ("images", "samples")):
                found[place] = file.read_bytes()
        return found

    def lost(self, name: str) -> int:
        """Steps that are logged, but in no whole checkpoint."""
        run = self.folder(name) / "run"
        if self.kind == "evaluate" or not (run / "metrics.jsonl").exists():
            return 0
        logged = (run / "metrics.jsonl").read_text().count("}\n")
        whole, _ = checkpoint_folder.newest_whole(run)
        return logged - (int(whole.name.rpartition("-")[2]) if whole else 0)

    def survive(self, kills: list[Kill]) -> dict[str, Any]:
        """Be killed in turn, as long as there is something to kill, and then be done."""
        self.chain += 1
        name, died, lost = f"chain-{self.chain}", 0, 0
        for kill in kills:
            code, _ = attempt(self.command(name), self.folder(name), kill)
            assert code in (0, -signal.SIGKILL), f"{self.kind}, {kill}: exit code {code}"
            died += code != 0
            lost = max(lost, self.lost(name))
            if code == 0:
                break
        code, _ = attempt(self.command(name), self.folder(name))
        found = self.result(name)
        places = self.expected.keys() | found.keys()
        differ = sorted(place for place in places if self.expected.get(place) != found.get(place))
        left = [str(path) for path in self.folder(name).rglob(".*")]
        drawn = [asdict(kill) for kill in kills]
        return dict(job=self.kind, kills=drawn, died=died, lost=lost, code=code, differ=differ, left=left)

    def draw(self, generator: random.Random) -> Kill:
        """A random moment of an uninterrupted attempt: an event, or a time."""
        if generator.random() < 0.5:
            return Kill(seconds=generator.uniform(0, self.seconds))
        return Kill(nth=generator.randint(1, len(self.events)))


def at_random(jobs: list[Job], count: int, seed: int) -> list[dict[str, Any]]:
    """Chains of up to three kills, over all jobs in turn, until `count` have died."""
    generator, results = random.Random(seed), []
    while sum(result["died"] for result in results) < count:
        job = jobs[len(results) % len(jobs)]
        left = count - sum(result["died"] for result in results)
        results.append(job.survive([job.draw(generator) for _ in range(min(3, left))]))
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Command line; writes FOLDER/results.json."""
    # tqdm's own lock is shared between processes: a child that is killed while it holds it would stop all others.
    tqdm.monitor_interval = 0  # no thread of its own, which could hold the lock when a child is forked
    tqdm.set_lock(threading.RLock())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline")
    parser.add_argument("checkpoint")
    parser.add_argument("pairs")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["grpo", "spo", "evaluate"], help="of --random")
    parser.add_argument("--at", type=json.loads, default={}, help='a chain each: {"grpo": [["PATTERN", NTH], ...]}')
    parser.add_argument("--random", type=int, default=0, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    Policy.load(args.pipeline)  # so that a child finds every module in memory
    kinds = args.at or args.kinds
    jobs = {kind: Job(kind, args.pipeline, args.checkpoint, args.pairs, args.folder) for kind in kinds}
    results = []
    for kind, kills in args.at.items():
        results.append(jobs[kind].survive([Kill(pattern, nth) for pattern, nth in kills]))
    results += at_random(list(jobs.values()), args.random, args.seed)
    (args.folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
