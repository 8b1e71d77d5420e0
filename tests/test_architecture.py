"""The direction of imports and what a file may hold: DESIGN.md, sections 2, 3 and 5, as tests."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# of rlg, earlier to later
CHAIN = ("process", "backbones", "policy", "guidance", "sampling", "evaluator", "evaluate", "report")
REWARD_TYPES = {"Reward", "RewardError", "RewardMix", "RewardScores", "RewardSpec"}
CALLS_ITS_READER = {("evaluate", "report")}  # the command writes the report when it is done
# Inside of names too; but "tiny-sd3" is a file's name in a help text, and transformers is a library's.
FAMILY_WORDS = re.compile(r"(?<!tiny-)(?:sdxl|sd3|unet|transformer(?!s)|velocity|prediction_type)", re.IGNORECASE)


def sources(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """("package.module.name", at module level) of everything that a file imports."""
    tree = ast.parse(file.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) not in inside) for alias in node.names)


def code(file: Path) -> str:
    """A file without docstrings and comments, strings kept."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_there_is_something_to_test() -> None:
    assert {file.name for file in sources("trainers")} >= {"common.py", "grpo.py"}
    assert {name for name, _ in imports(ROOT / "rlg" / "policy.py")} >= {
        "rlg.adapters",
        "rlg.process.Process",
        "torch",
    }
    assert [top for name, top in imports(ROOT / "rlg" / "policy.py") if name == "rlg.tinyworld"] == [False]
    assert all((ROOT / "rlg" / f"{name}.py").is_file() or (ROOT / "rlg" / name).is_dir() for name in CHAIN)


@pytest.mark.parametrize(("package", "forbidden"), [("rewards", ("rlg", "trainers")), ("rlg", ("trainers",))])
def test_packages_import_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    for file in sources(package):
        assert not [name for name, _ in imports(file) if name.split(".")[0] in forbidden], file


def test_rlg_takes_types_from_rewards_and_builds_none_outside_of_entry_points() -> None:
    for file in sources("rlg"):
        taken = [(name, top) for name, top in imports(file) if name.split(".")[0] == "rewards"]
        of_the_world = "rewards.blobs." if file.parent.name == "tinyworld" else None
        for name, top in taken:
            is_type = name.removeprefix("rewards.") in REWARD_TYPES
            palette = of_the_world is not None and name.startswith(of_the_world)
            entry_point = not top and "def main(" in file.read_text()
            assert is_type or palette or entry_point, f"{file.relative_to(ROOT)} imports {name}"


def test_rlg_modules_import_earlier_ones_only() -> None:
    for place, name in enumerate(CHAIN):
        files = sources(f"rlg/{name}") or [ROOT / "rlg" / f"{name}.py"]
        rows = {(row.split(".")[1], top) for file in files for row, top in imports(file) if row.startswith("rlg.")}
        later = [m for m, top in rows if m in CHAIN[place + 1 :] and (top or (name, m) not in CALLS_ITS_READER)]
        assert not later, f"{name} imports {', '.join(later)}"


def test_trainers_never_ask_for_the_family() -> None:
    for file in sources("trainers"):
        found = FAMILY_WORDS.findall(code(file))
        assert not found, f"{file.name}: {found}"


def test_root_scripts_are_short() -> None:
    scripts = sorted(ROOT.glob("train_*.py"))
    assert scripts
    assert all(len(file.read_text().splitlines()) <= 45 for file in scripts)


@pytest.mark.parametrize("folder", ["rlg", "trainers", "rewards"])
def test_no_file_is_over_450_lines(folder: str) -> None:
    long = {f.name: n for f in sources(folder) if (n := len(f.read_text().splitlines())) > 450}
    assert not long


def test_nothing_unpickles() -> None:
    for file in [*sources("rlg", "trainers", "rewards"), *ROOT.glob("*.py")]:
        names = [name for name, _ in imports(file)]
        assert not [n for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve")], file
        text = code(file)
        if (
            file.name == "models.py" and file.parent.name == "rewards"
        ):  # published weights, as tensors and nothing else
            text = re.sub(r"torch\.load\([^()]*, weights_only=True\)", "", text)
        called = re.findall(r"\b(?:torch\.(?:load|save)|allow_pickle|load_state|save_state)\b", text)
        assert not called, f"{file.name}: {called}"


def test_tracked_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    sizes = {f: f.stat().st_size for f in files if f.is_file()}
    assert len(sizes) > 50
    limit = {f: (16 if f.suffix == ".safetensors" else 8) * 2**20 for f in sizes}
    assert not [f.name for f, size in sizes.items() if size > limit[f]]
