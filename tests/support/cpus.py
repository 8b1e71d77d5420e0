"""Runs the numerics tests as other CPUs would: `make test-cpus`, or `python -m tests.support.cpus [flags]`.

Every pair of settings occurs in some run, which takes fewer runs than all combinations; see docs/reproducibility.md.

    kernels              the machine's own, or the double whose results depend on the number of rows
    MKL_CBWR             how Intel's library blocks a product (it does nothing on other CPUs)
    ATEN_CPU_CAPABILITY  torch's own kernels: default (no vectors), avx2, avx512, up to what the CPU has
    OMP_NUM_THREADS      1 or 2
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from tests.support.paths import ROOT, TESTS

CAPABILITIES = ("default", "avx2", "avx512")
KERNELS = "kernels"
Setting = dict[str, str]  # "" leaves a variable unset


def factors(capability: str) -> dict[str, tuple[str, ...]]:
    """Values of each setting on a CPU whose best kernels are of a capability."""
    best = CAPABILITIES.index(capability) if capability in CAPABILITIES else 0
    return {
        KERNELS: ("", "by_rows"),
        "MKL_CBWR": ("", "COMPATIBLE"),
        "ATEN_CPU_CAPABILITY": CAPABILITIES[: best + 1],
        "OMP_NUM_THREADS": ("1", "2"),
    }


def covering(values: Mapping[str, Sequence[str]]) -> list[Setting]:
    """Few settings that hold every pair of values of two factors: greedily, the one with most new pairs next."""
    candidates = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    missing = set().union(*map(_pairs, candidates))
    chosen = []
    while missing:
        chosen.append(max(candidates, key=lambda setting: len(_pairs(setting) & missing)))
        missing -= _pairs(chosen[-1])
    return chosen


def _pairs(setting: Setting) -> set[frozenset[tuple[str, str]]]:
    return set(map(frozenset, itertools.combinations(setting.items(), 2)))


def run(setting: Setting, flags: Sequence[str], cores: int) -> int:
    """The exit status of the numerics tests under a setting, on workers that fill the cores with their threads."""
    environment = {name: value for name, value in (os.environ | setting).items() if value and name != KERNELS}
    workers = max(1, min(cores, 4) // int(setting["OMP_NUM_THREADS"]))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "numerics", "-n", str(workers), "--dist", "loadgroup"]
    command += [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "mark.numerics" in file.read_text()]
    command += [f"--kernels={setting[KERNELS]}"] if setting[KERNELS] else []
    return subprocess.run([*command, *flags], cwd=ROOT, env=environment, check=False).returncode


def main(flags: Sequence[str]) -> int:
    """0 if all runs passed; all are made, so that one sees which settings fail."""
    import torch

    failed = []
    for setting in covering(factors(torch.backends.cpu.get_cpu_capability().lower())):
        said = " ".join(f"{name}={value}" for name, value in setting.items() if value)
        print(f"-- {said}", flush=True)
        started = time.monotonic()
        if run(setting, flags, os.cpu_count() or 1):
            failed.append(said)
        print(f"   {time.monotonic() - started:.0f} s", flush=True)
    for said in failed:
        print(f"failed: {said}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
