"""The order of packages and what a file may hold: docs/design.md, as tests."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from rlg.models.backbones import BACKBONES
from rlg.models.backbones.networks import DENOISERS
from tests.support.paths import ROOT

OURS = ("rlg", "trainers", "rewards")
# Earlier to later; what stands on one floor does not import each other. A name is a package or a module of rlg/.
FLOORS = (
    ("choices",),
    ("io", "stats", "extras"),
    ("cli", "distributed"),
    ("config_files", "own_packages"),
    ("config_parser",),
    ("rewards", "prompts", "diffusion"),
    ("tinyworld",),
    ("models",),
    ("tasks",),
    ("guidance",),
    ("search", "integrations", "pretraining"),
    ("evaluation",),
    ("runs", "publishing"),
    ("reports",),
    ("equivalence", "benchmark", "app", "commands"),
    ("__main__",),
    ("trainers",),
    ("scripts",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# At most four, each with its reason.
EXCEPTIONS = {
    ("rlg.tinyworld.preferences", "rlg.preferences"): "the former name of a command, kept for one release",
    ("rlg.tinyworld.show", "rlg.pretraining.show"): "the former name of a command, kept for one release",
    ("rlg.__main__", "trainers.commands"): "`rlg train NAME` reaches a trainer by its name",
    ("rlg.benchmark.__main__", "trainers.benchmark.grpo"): "`rlg.benchmark grpo` measures a trainer",
}
MOST_MODULES = 12
MODULE = re.compile(r"(?:rlg|trainers|rewards)(?:\.\w+)+")  # as `import_module` takes it
# What rewards take of rlg: words, and no torch.
LIGHT = {
    *(
        "rlg.__version__",
        "rlg.extras",
        "rlg.cli.fail_cleanly",
        "rlg.config_parser.Command",
        "rlg.config_parser.option",
    ),
    *("rlg.io.pixels.levels", "rlg.io.pixels.to_pil"),
}
REWARD_TYPES = {"Reward", "RewardError", "RewardMix", "RewardScores", "RewardSpec", "detectors.detection.Detection"}
# Inside of names too; but "tiny-sd3" is a file's name in a help text, and transformers is a library's.
FAMILY_WORDS = re.compile(r"(?<!tiny-)(?:sdxl|sd3|unet|transformer(?!s)|velocity|prediction_type)", re.IGNORECASE)

# A family, a pipeline or network of one by its class, and its place in a pipeline: what only a backbone may ask for.
FAMILY_FILES = {file.stem for file in (ROOT / "rlg/models/backbones").glob("*.py")} - {"__init__", "base", "networks"}
OF_A_FAMILY = re.compile("|".join((*BACKBONES, *FAMILY_FILES, *DENOISERS, "sd15", r"\w*(UNet|Transformer)\w*Model")))
# Modules that name one all the same, each with its reason; `models/backbones` is where families are known.
NAMING = {
    "rlg.choices": "names that --help lists without torch",
    "rlg.benchmark.architectures": "makes networks of published sizes, by name",
    "rlg.tinyworld": "makes tiny-sdxl on first use",
    "rlg.tinyworld.networks": "makes the world's own networks, by name",
    "rlg.pretraining.settings": "a budget for each base model of the world, by name",
}


def sources(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sources(*OURS)}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """("package.module.name", at module level) of all that a file imports, and of modules that it names in strings."""
    tree = parsed(file)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            yield node.value, id(node) not in inside


def module_of(name: str) -> str | None:
    """The module of ours that an imported name belongs to."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else None


def arrows() -> set[tuple[str, str]]:
    """(importing module, imported module) within the project."""
    found = {(module, module_of(name)) for module, file in MODULES.items() for name, _ in imports(file)}
    return {(module, other) for module, other in found if other is not None and other != module}


def place(module: str) -> str:
    """The package, or word of all, that stands on a floor."""
    first, _, rest = module.partition(".")
    second = rest.partition(".")[0]
    if first != "rlg":
        return first
    return second if second in FLOOR else "commands"


def code(file: Path) -> str:
    """A file without docstrings and comments, strings kept."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_there_is_something_to_test() -> None:
    assert {"trainers.grpo", "rlg.models.policy", "rewards.jpeg"} <= MODULES.keys()
    assert ("rlg.models.policy", "rlg.models.adapter_files") in arrows()
    assert ("rlg.benchmark.__main__", "trainers.benchmark.grpo") in arrows()  # by `import_module`
    assert [top for name, top in imports(MODULES["rlg.models.loading"]) if name == "rlg.tinyworld"] == [False]


def test_imports_go_down() -> None:
    """No module imports a package above its own, or beside it on one floor; functions and strings count."""
    assert len(EXCEPTIONS) <= 4 and EXCEPTIONS.keys() <= arrows()
    up = []
    for module, other in sorted(arrows() - EXCEPTIONS.keys()):
        here, there = place(module), place(other)
        if other != "rlg" and here != there and FLOOR[there] >= FLOOR[here]:
            up.append(f"{module} -> {other}")
    assert not up


def test_imports_make_no_circle() -> None:
    below = defaultdict(set)
    for module, other in arrows() - EXCEPTIONS.keys():
        below[module].add(other)
    left = set(MODULES)
    while ends := {module for module in left if not below[module] & left - {"rlg"}}:
        left -= ends
    assert not left


def test_packages_are_small() -> None:
    """At most 12 modules a package; a file a reward, a trainer, a backbone, and rlg's own top excepted."""
    count: dict[str, int] = defaultdict(int)
    for module, file in MODULES.items():
        count[module.rpartition(".")[0]] += file.name != "__init__.py"
    free = {"", "rlg", "rewards", "trainers", "rlg.models.backbones"}
    assert not {package: n for package, n in count.items() if n > MOST_MODULES and package not in free}


def test_the_top_of_rlg_holds_commands_and_words() -> None:
    for file in (ROOT / "rlg").glob("*.py"):
        is_word = file.stem in FLOOR or file.stem == "__init__"
        assert is_word or "def main(" in file.read_text(), file.name


def test_a_main_module_is_a_command() -> None:
    for module, file in MODULES.items():
        if file.name == "__main__.py":
            tree = parsed(file)
            assert not [node.name for node in tree.body if isinstance(node, ast.ClassDef)], module
            assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, module


def test_rewards_take_words_alone() -> None:
    for file in sources("rewards"):
        found = {name for name, _ in imports(file) if name.split(".")[0] in ("rlg", "trainers")}
        assert not found - LIGHT, file


def test_rlg_takes_types_from_rewards_and_builds_none_outside_of_entry_points() -> None:
    for file in sources("rlg"):
        taken = [(name, top) for name, top in imports(file) if name.split(".")[0] == "rewards"]
        of_the_world = ("rewards.detectors.blobs.", "rewards.detectors.sprites.")
        for name, top in taken:
            is_type = name.removeprefix("rewards.") in REWARD_TYPES
            palette = file.parent.name in ("tinyworld", "pretraining") and name.startswith(of_the_world)
            entry_point = not top or file.name == "__main__.py"
            assert is_type or palette or entry_point, f"{file.relative_to(ROOT)} imports {name}"


def test_trainers_never_ask_for_the_family() -> None:
    for file in sources("trainers"):
        found = FAMILY_WORDS.findall(code(file))
        assert not found, f"{file.name}: {found}"


def test_only_backbones_know_families() -> None:
    """No other module names a family, a class of its pipeline or network, or its place in a pipeline."""
    found = {}
    for module, file in MODULES.items():
        if module.startswith(("rlg", "trainers")) and not module.startswith("rlg.models.backbones"):
            found[module] = sorted(filter(OF_A_FAMILY.fullmatch, words(file)))
    naming = {module: names for module, names in found.items() if names}
    assert {module: names for module, names in naming.items() if module not in NAMING} == {}
    assert naming.keys() == NAMING.keys(), "an exception that nobody needs"


def words(file: Path) -> set[str]:
    """Names that a file imports, its attributes, and its strings."""
    found = {name.rpartition(".")[2] for name, _ in imports(file)}
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_one_loop_makes_the_steps() -> None:
    """`process.step` is called by `sampling.advance`, and by the plain reference that the benchmark compares with."""
    asking = {name for name, file in MODULES.items() if re.search(r"\bprocess\.step\(", code(file))}
    assert asking == {"rlg.diffusion.sampling", "trainers.benchmark.plain_grpo"}


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
            file.name == "weights.py" and file.parent.name == "rewards"
        ):  # published weights, as tensors and nothing else
            text = re.sub(r"torch\.load\([^()]*, weights_only=True\)", "", text)
        called = re.findall(r"\b(?:torch\.(?:load|save)|allow_pickle|load_state|save_state)\b", text)
        assert not called, f"{file.name}: {called}"


def tracked() -> list[str]:
    """The files that git holds; skips the test outside of a checkout."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name]


def test_git_holds_every_module() -> None:
    """An entry of .gitignore without an anchor would swallow a package of that name."""
    there = {str(file.relative_to(ROOT)) for file in sources("rlg", "trainers", "rewards", "tests")}
    assert len(there) > 150
    assert not sorted(there - set(tracked()))


def test_tracked_files_are_small() -> None:
    sizes = {f: f.stat().st_size for name in tracked() if (f := ROOT / name).is_file()}
    assert len(sizes) > 50
    limit = {f: (16 if f.suffix == ".safetensors" else 8) * 2**20 for f in sizes}
    assert not [f.name for f, size in sizes.items() if size > limit[f]]
