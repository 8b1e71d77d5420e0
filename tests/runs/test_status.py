"""`python -m rlg.status`: what it says of runs by their files, and that no folder can stop or garble it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from rlg.evaluation import evaluator
from rlg.evaluation.evaluator import EvalSettings, Evaluator
from rlg.prompts import Prompt
from rlg.runs import status
from rlg.runs.status import Status, collect, duration, step_seconds, tail
from rlg.runs.sweep_folder import Sweep, SweepRun, write_sweep
from rlg.status import main
from trainers.grpo import GRPOTrainer

NOW = 1_000_000_000.0


def age(folder: Path, seconds: float) -> None:
    """Make all files of a folder as old as that, at NOW."""
    for file in folder.rglob("*"):
        if not file.is_symlink():
            os.utime(file, (NOW - seconds, NOW - seconds))


def training(folder: Path, steps: int = 3, seconds: float = 10.0, idle: float = 5.0, **config) -> Path:
    """A run of 20 steps that makes 4 images a step."""
    folder.mkdir(parents=True)
    settings = {"max_steps": 20, "reward": ["ocr=paddleocr"]} | config
    (folder / "config.yaml").write_text(json.dumps(settings))
    rows = [{"step": 0, "eval/ocr": 0.5}]
    for i in range(1, steps + 1):
        rows.append(
            {"step": i, "reward": 0.1 * i, "images": 4.0 * i, "seconds": seconds * i, "seconds_per_image": 2.5}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    age(folder, idle)
    return folder


def evaluation(folder: Path, rows: int = 6, total: int | None = 10, file: str = "scores-0.jsonl") -> Path:
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"trained_rewards": ["ocr=x"]}))
    (folder / file).write_text(json.dumps({"seconds": 0.5}).join(["", *["\n"] * rows]))
    if total is not None:
        (folder / "plan.json").write_text(json.dumps({"images": total}))
    age(folder, 5)
    return folder


def only(root: Path) -> Status:
    ((found,),) = collect(root, NOW)
    return found


def test_a_training_run(tmp_path: Path) -> None:
    run = training(tmp_path / "runs" / "a")
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-9.tmp", ".checkpoint-12.tmp"):
        (run / name).mkdir()
    expected = Status(
        name="a",
        kind="training",
        state="running",
        step=3,
        total=20,
        reward=0.5,
        reward_name="eval/ocr",  # on held-out prompts rather than on its own
        seconds_per_step=10.0,
        images_per_second=0.4,
        seconds_left=170.0,
        checkpoint="checkpoint-10",
        idle_seconds=5.0,
    )
    assert only(tmp_path / "runs") == expected == only(run)


def test_a_trainer_and_an_evaluator_leave_what_is_read(
    tiny_trainer: Callable[..., GRPOTrainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(max_steps=2, save_steps=2)
    trainer.train()
    settings = EvalSettings((0.0, 1.0), ("rlg",), 2, "ode", 0.0, 1.0, None, k=1, seed=0, batch_size=2)
    prompts = [Prompt("a"), Prompt("b")]
    folder = tmp_path / "run" / "eval" / "e"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"trained_rewards": ["brightness"]}))
    evaluator.evaluate(Evaluator(trainer.policy, trainer.reward, prompts, settings), folder, [0, 1], lambda job: False)
    ((run, inside),) = collect(tmp_path, time.time())
    assert (run.name, run.state, run.step, run.total, run.checkpoint) == ("run", "done", 2, 2, "checkpoint-2")
    assert run.seconds_per_step is not None and run.images_per_second is not None
    assert (inside.name, inside.kind, inside.step, inside.total) == ("run/eval/e", "evaluation", 4, 4)


@pytest.mark.parametrize(
    ("idle", "seconds", "state"),
    [(119, 1, "running"), (121, 1, "stopped"), (499, 100, "running"), (501, 100, "stopped")],
)
def test_without_a_lock_file_the_age_decides(tmp_path: Path, idle: float, seconds: float, state: str) -> None:
    training(tmp_path / "a", seconds=seconds, idle=idle)
    assert only(tmp_path).state == state


def test_a_lock_file_decides_over_the_age(tmp_path: Path) -> None:
    run = training(tmp_path / "a", idle=9999)
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert only(tmp_path).state == "running"
    age(run, 1)
    assert only(tmp_path).state == "stopped"  # nobody holds it
    training(tmp_path / "b", steps=20, idle=1)
    assert {s.name: s.state for (s,) in collect(tmp_path, NOW)} == {"a": "stopped", "b": "done"}


def test_a_resumed_run_goes_by_its_last_checkpoint(tmp_path: Path) -> None:
    run = training(tmp_path / "a", steps=21, idle=9999)
    assert (only(tmp_path).state, only(tmp_path).total, only(tmp_path).seconds_left) == ("stopped", None, None)
    (run / "checkpoint-21").mkdir()
    (run / "checkpoint-21" / "config.yaml").write_text("max_steps: 24\n")
    assert (only(tmp_path).state, only(tmp_path).total, only(tmp_path).seconds_left) == ("stopped", 24, 30.0)


def test_step_times() -> None:
    online = [
        {"step": i, "images": 1, "seconds": s} for i, s in ((0, 0.0), (4, 40.0), (5, 41.0), (6, 44.0), (8, 48.0))
    ]
    assert step_seconds(online) == 2.0  # the median of 1, 3, 2
    assert step_seconds(online[:2]) == 10.0
    preferences = [{"step": i, "pairs": 64 * i, "seconds_per_pair": 0.5} for i in (1, 2, 3)]
    assert step_seconds(preferences) == step_seconds(preferences[:1]) == 32.0
    assert step_seconds([{"step": i, "seconds": s} for i, s in ((1, 9.0), (2, 2.0), (3, 3.0))]) == 3.0
    assert step_seconds([{"step": 0, "eval/x": 1.0}]) is None
    assert step_seconds([{"step": 1, "images": 1, "seconds": "x"}, {"step": 2, "seconds": float("nan")}]) is None


def test_an_evaluation_on_its_way(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a")
    (folder / "scores-1.jsonl").write_text('{"seconds": 0.5}\n')
    age(folder, 5)
    found = only(tmp_path)
    assert (found.state, found.step, found.total) == ("running", 7, 10)
    assert found.images_per_second == 4.0  # two processes of half a second each
    assert found.seconds_left == 0.75
    evaluation(tmp_path / "b", rows=10)  # all there, but not joined yet
    assert {status.name: status.state for (status,) in collect(tmp_path, NOW)} == {"a": "running", "b": "running"}


def test_a_finished_evaluation(tmp_path: Path) -> None:
    summary = {
        "points": [
            {"method": mode, "w": w, "n": 5, "rewards": {"ocr": {"mean": mean}}}
            for mode, w, mean in (("rlg", 0.0, 0.2), ("rlg", 2.0, 0.7), ("lora_scale", 2.0, 0.9))
        ]
    }
    for name, total in (("before plan.json", None), ("planned", 15)):
        folder = evaluation(tmp_path / name, 15, total, "scores.jsonl")
        (folder / "summary.json").write_text(json.dumps(summary))
        age(folder, 5)
        found = only(tmp_path / name)
        assert (found.state, found.step, found.total, found.seconds_left) == ("done", 15, 15, None)
        assert (found.reward_name, found.reward, found.note) == ("ocr", 0.7, "at w = 2")


def test_a_sweep_and_the_runs_inside(tmp_path: Path) -> None:
    runs = [SweepRun("run-000", {}, "finished", 0.25), SweepRun("run-001", {}, "failed"), SweepRun("run-002", {})]
    write_sweep(tmp_path / "s", Sweep({"metric": {"name": "reward", "goal": "maximize"}}, 0, runs))
    training(tmp_path / "s" / "run-002", idle=1)
    training(tmp_path / "s" / "run-000", steps=20, idle=99)
    age(tmp_path / "s", 5)
    ((sweep, *inside),) = collect(tmp_path, NOW)
    assert (sweep.kind, sweep.state, sweep.step, sweep.total) == ("sweep", "running", 2, 3)
    assert (sweep.reward, sweep.reward_name, sweep.note) == (0.25, "reward", "1 failed")
    assert [run.name for run in inside] == ["s/run-000", "s/run-002"]
    age(tmp_path / "s", 5000)
    assert collect(tmp_path, NOW)[0][0].state == "stopped"


def test_running_first_then_the_most_recent(tmp_path: Path) -> None:
    for name, idle in (("old", 3000), ("new", 2000), ("live", 400)):
        training(tmp_path / name, idle=idle, seconds=100.0 if name == "live" else 1.0)
    evaluation(tmp_path / "old" / "eval" / "e", 10, 10, "scores.jsonl")  # five seconds ago
    names = [[run.name for run in group] for group in collect(tmp_path, NOW)]
    assert names == [["live"], ["old", "old/eval/e"], ["new"]]


def test_the_end_of_a_long_file_is_enough(tmp_path: Path) -> None:
    run = training(tmp_path / "a")
    with (run / "metrics.jsonl").open("rb+") as file:
        rows = file.read()
        file.seek(1 << 40)  # a hole; nobody reads a terabyte
        file.write(b"\n" + rows)
    assert only(tmp_path).step == 3
    (run / "rows").write_text('{"a": 1}\n[2]\n{"a": 3}\n{"a": ')
    assert tail(run / "rows") == [{"a": 1}, {"a": 3}]
    assert tail(run / "rows", 18) == [{"a": 3}]


BROKEN: dict[str, Callable[[Path], object]] = {
    "yaml": lambda run: (run / "config.yaml").write_text("a: [\n" * 9),
    "list": lambda run: (run / "config.yaml").write_text("- 1"),
    "bytes": lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
    "no-steps": lambda run: (run / "config.yaml").write_text("max_steps: many"),
    "negative": lambda run: (run / "config.yaml").write_text("max_steps: -4"),
    "deep": lambda run: (run / "config.yaml").write_text("[" * 9000),
    "huge": lambda run: os.truncate(run / "config.yaml", 1 << 33),
    "tag": lambda run: (run / "config.yaml").write_text("!!python/object/apply:os.system ['touch owned']"),
    "meta": lambda run: (run / "meta.json").write_text("[" * 100_000),
    "sweep": lambda run: (run / "sweep.json").write_text('{"runs": 3}'),
    "sweep-runs": lambda run: (run / "sweep.json").write_text('{"config": [], "seed": 0, "runs": []}'),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_is_one_line(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    BROKEN[damage](training(tmp_path / "bad"))
    training(tmp_path / "good")
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert [line.split()[:2] for line in lines[1:]] == [["good", "stopped"], ["bad", "broken"]]
    assert sorted(os.listdir(tmp_path)) == ["bad", "good"]


def test_what_is_in_metrics_does_not_matter(tmp_path: Path) -> None:
    run = training(tmp_path / "a")
    rows = [{"step": -1}, {"step": True}, {"step": "9"}, {"step": 10**400}, {"step": None}, {}]
    odd = {"step": 4, "seconds": None, "images": [], "seconds_per_image": 0, "eval/ocr": 1e400, "reward": {"x": 1}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [odd, *rows]) + "\x00[[[")
    found = only(tmp_path)
    assert (found.step, found.reward, found.seconds_per_step, found.images_per_second) == (4, None, None, None)


def test_pipes_links_and_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "photos" / "2026").mkdir(parents=True)
    training(tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.yaml")
    (tmp_path / "average").mkdir()
    (tmp_path / "a" / "average" / "adapter").mkdir(parents=True)
    (tmp_path / "a" / "average" / "config.yaml").write_text("max_steps: 20")
    found = {run.name: run.state for group in collect(tmp_path, NOW) for run in group}
    assert found == {"a": "running", "photos": "no run", "pipe": "broken", "average": "no run"}


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\u202eb"


def test_names_do_not_reach_the_terminal_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training(tmp_path / HOSTILE, reward=[HOSTILE])
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    (tmp_path / HOSTILE / "metrics.jsonl").write_text(json.dumps({"step": 1, f"eval/{HOSTILE}": 1}) + "\n")
    (training(tmp_path / "bad") / "config.yaml").write_text(f"{json.dumps(HOSTILE)}: [")
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert all(c.isprintable() for line in out.split("\n") for c in line)
    assert len(out.splitlines()) == 4
    assert "a?]0;owned??[2J??b" in out
    main([str(tmp_path), "--json"])
    out = capsys.readouterr().out
    assert out.isascii() and all(c.isprintable() for c in out.rstrip("\n"))
    assert HOSTILE in {run["name"] for run in json.loads(out)}


def test_json_holds_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training(tmp_path / "a")
    main([str(tmp_path), "--json"])
    (run,) = json.loads(capsys.readouterr().out)
    assert run.keys() == asdict(Status("")).keys()
    assert (run["name"], run["state"], run["step"]) == ("a", "stopped", 3)


def test_watching_ends_with_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training(tmp_path / "a")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        training(tmp_path / f"b{len(naps)}")
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", nap)
    main([str(tmp_path), "--watch", "0.5"])
    out = capsys.readouterr().out
    assert naps == [0.5] * 3
    assert [part.count("stopped") for part in out.split("run  ")[1:]] == [1, 2, 3]
    assert "\x1b" not in out  # not a terminal


def test_durations() -> None:
    said = [duration(s) for s in (None, 0.4, 59, 60, 3599, 3600, 3720, 86399, 90000)]
    assert said == ["", "0 s", "59 s", "1 min", "60 min", "1 h 0 min", "1 h 2 min", "23 h 59 min", "1 d 1 h"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder: nowhere"),
        ([".", "--watch", "0"], "--watch needs a positive number of seconds, got 0"),
        ([".", "--watch", "nan"], "watch must be finite, got nan"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
