"""launch/slurm.sbatch with stand-ins for Slurm and accelerate: signals reach the trainers, and the job comes back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"
PROGRAMS = {
    # a task has a process group of its own, which Slurm signals
    "srun": """while [[ $1 == -* ]]; do shift; done
export SLURM_NODEID=0; exec setsid --wait bash -c 'echo $$ > task.tmp; mv task.tmp task; exec "$@"' task "$@" """,
    "scontrol": 'if [ "$1" = show ]; then echo node0; else echo "$@" >> log; fi',
    "accelerate": """echo "$@" > arguments; trap 'echo launcher killed >> log' TERM USR1
bash -c 'trap "echo saved >> log; exit 0" TERM; touch started; for _ in {1..600}; do [ -e end ] && exit $(cat end)
sleep 0.05; done' & wait $!""",
    "python": f"""if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
printf 'name: run\\noutput_dir: runs\\n# derived\\n# processes: 1\\n'""",
}
pytestmark = pytest.mark.skipif(not (shutil.which("setsid") and shutil.which("pkill")), reason="no setsid or pkill")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Folder of a job, which holds a launch/ and the stand-ins, in bin/."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for name, text in PROGRAMS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    return tmp_path


def submitted(job: Path, **environment: str) -> subprocess.Popen:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{job / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), "train_grpo.py", "--config", "a b.yaml"]
    return subprocess.Popen(command, cwd=job, env=os.environ | slurm | {"PATH": path} | environment)


def wait_for(file: Path) -> str:
    for _ in range(600):
        if file.exists():
            return file.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {file}")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_trainers_alone_and_the_job_is_requeued(number: signal.Signals, job: Path) -> None:
    process = submitted(job)
    wait_for(job / "started")
    os.killpg(int(wait_for(job / "task")), number)
    assert process.wait(60) == 0
    assert (job / "log").read_text().splitlines() == ["saved", "requeue 7"]


@pytest.mark.parametrize("status", [0, 2])
def test_what_ends_by_itself_is_not_requeued(status: int, job: Path) -> None:
    (job / "end").write_text(str(status))
    assert submitted(job, ENGINE="zero3").wait(60) == status
    assert not (job / "log").exists()
    arguments = (job / "arguments").read_text()
    assert arguments.startswith("launch --config_file launch/accelerate/zero3.yaml --num_machines 2 --machine_rank 0")
    assert "--num_processes 16 --main_process_ip node0" in arguments
    assert arguments.endswith("train_grpo.py --config a b.yaml\n")


@pytest.mark.parametrize("saved", [True, False])
def test_a_job_that_is_back_goes_on(saved: bool, job: Path) -> None:
    (job / "end").write_text("0")
    if saved:
        (job / "runs" / "run" / "checkpoint-3").mkdir(parents=True)
        (job / "runs" / "run" / "checkpoint-3" / "state.json").touch()
    assert submitted(job, SLURM_RESTART_COUNT="1").wait(60) == 0
    assert (job / "arguments").read_text().rstrip().endswith("--resume" if saved else "--overwrite")


def test_an_engine_without_a_file_is_refused(job: Path) -> None:
    assert submitted(job, ENGINE="zero9").wait(60) == 2
    assert not (job / "arguments").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_takes_the_file(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == yaml.safe_load(file.read_text())["num_processes"]
    assert config.mixed_precision in ("no", None)
