"""Files as an attacker or a tired colleague makes them: what is said, what stays as it was, what memory it takes.

Thousands of spoilt ones are in test_hostile_fuzz.py, folders, images and servers in test_hostile_folders.py. More
pickles of adapters and base models are in test_adapters.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlg import cli
from rlg.io.parsing import read_yaml
from rlg.io.run_folder import run_settings
from rlg.models import adapter_files
from rlg.models.policy import Policy
from rlg.runs.sweep_folder import read_sweep
from rlg.tasks import prompt_sets
from tests.support.hostile import said
from trainers.checkpoints.checkpoint import read_state
from trainers.core.config import parse_config
from trainers.data import preference_pairs
from trainers.grpo import GRPOConfig

WEIGHTS = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
DIFFUSERS = "pytorch_lora_weights.safetensors"


# --- text files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch x']", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("a: &x [1]\nb: *x", "*x stands for a list or a mapping; write it out"),
        ("a: &x [*x]", "*x stands for a list or a mapping"),
        ("a: &x {b: 1}\nc: {<<: *x}", "*x stands for a list or a mapping"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is given twice"),
        ("a: {b: 1, b: 1}", "the key 'b' is given twice"),
        ("[1, 2]", "must be a mapping of options to values"),
        ("on: 1", "the key True is no text; write it in quotes"),
        ("a: " + "[" * 5000 + "]" * 5000, "lists and mappings are nested too deeply"),
        ("a: " + "[" * 70 + "]" * 70, "lists and mappings are nested too deeply"),
        ("a: 2026-13-45", "is not valid YAML"),
        ("a: !!timestamp x", "is not valid YAML"),
        ("#" * 1_000_001, "is no config: it is over 1 MB"),
        ("a: \udcff", "is not valid YAML"),
    ],
)
def test_yaml_that_is_more_than_values(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    answer = said(lambda: read_yaml(file), tmp_path)
    assert message in answer and str(file) in answer


def test_yaml_keeps_what_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &lr 1.0e-4\nb: *lr\nc: {<<: {d: 1}, e: [2]}\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": 1e-4, "b": 1e-4, "c": {"d": 1, "e": [2]}}


def test_billion_laughs_take_no_memory(tmp_path: Path) -> None:
    laughs, merged = "l0: &l0 [ha]\n", "m0: &m0 {k: 1}\n"
    for i in range(1, 12):
        laughs += f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n"
        merged += f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n"
    for text in (laughs, merged):
        (tmp_path / "config.yaml").write_text(text)
        for read in (
            run_settings,
            lambda folder: parse_config(GRPOConfig, ["--config", f"{folder}/config.yaml"]),
        ):
            assert "stands for a list or a mapping" in said(lambda read=read: read(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"max_steps": [1]}, "max_steps must be int, got [1]"),
        ({"max_steps": True}, "max_steps must be int, got True"),
        ({"learning_rate": {}}, "learning_rate must be float, got {}"),
        ({"learning_rate": None}, "learning_rate must be float, got None"),
        ({"weight_decay": float("nan")}, "weight_decay must be float, got nan"),
        ({"weight_decay": "nan"}, "weight_decay must be finite, got nan"),
        ({"reward": "composition"}, "reward must be list[str], got 'composition'"),
        ({"reward": [1]}, "reward must be list[str], got [1]"),
        ({"name": 5}, "name must be str, got 5"),
        ({"name": "../x"}, "name must be a plain folder name, got '../x'"),
        ({"resolution": [64]}, "resolution must be int | None, got [64]"),
        ({"env": {"LD_PRELOAD": "x"}}, "env is not read here"),
    ],
)
def test_a_training_config_of_wrong_types(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    known = {"base": "tiny-sd3", "name": "x", "reward": ["composition"], "prompts": "p"}
    (tmp_path / "c.yaml").write_text(json.dumps(known | row).replace("NaN", ".nan"))
    answer = said(lambda: parse_config(GRPOConfig, ["--config", str(tmp_path / "c.yaml")]), tmp_path)
    assert message in answer and "LD_PRELOAD" not in os.environ


def test_a_config_that_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(GRPOConfig, ["--config"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: argument --config: expected one argument; see --help\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is given twice"),
        ('{"prompt": "a", "x": NaN}', "NaN is no finite number"),
        ('{"prompt": "a", "x": -Infinity}', "-Infinity is no finite number"),
        ('{"prompt": "a", "x": 1e999}', "1e999 is no finite number"),
        ('{"prompt": "a", "x": ' + "9" * 999 + "}", "a whole number of 999 digits"),
        ('{"prompt": "a", "x": ' + "[" * 99999 + "]" * 99999 + "}", "lists and mappings are nested too deeply"),
        ('{"prompt": "a\\ud800"}', "the prompt holds half a surrogate pair"),
        ('{"prompt": ["a"]}', "a row needs a text under `prompt`"),
        ('{"prompt": "a"' + " " * 10**6, "not JSON"),
    ],
)
def test_prompts_that_are_none(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    answer = said(lambda: prompt_sets.load(str(tmp_path / "p.jsonl")), tmp_path)
    assert message in answer and f"{tmp_path / 'p.jsonl'}:2" in answer and len(answer) < 1000


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("p.jsonl", lambda file: prompt_sets.load(str(file))),
        ("p.txt", lambda file: prompt_sets.load(str(file))),
        ("config.yaml", lambda file: run_settings(file.parent)),
        ("sweep.json", lambda file: read_sweep(file.parent)),
        ("state.json", lambda file: read_state(file.parent)),
        ("rows.jsonl", lambda file: preference_pairs.load(str(file), cache_dir=file.parent)),
        ("rows.parquet", lambda file: preference_pairs.load(str(file), cache_dir=file.parent)),
        ("x.safetensors", adapter_files.read),
    ],
)
def test_a_pickle_by_any_name_is_not_unpickled(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert name.split(".")[0] in said(lambda: read(tmp_path / name), tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_an_error_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), cli.fail_cleanly():
        raise ValueError("no such file: \x1b[2J\x1b]0;owned\x07\r\u202egnp.exe\nlast")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line[:-1].isprintable() and "last" in line


# --- adapters, networks and pipelines


@pytest.fixture
def lora(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A sound checkpoint to spoil."""
    shutil.copytree(tiny_checkpoint("sd"), tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture(scope="module")
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    """A base without adapter; whatever is refused leaves it so."""
    return Policy.load(str(tiny_folder("sd")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, "size mismatch: r is 1000000000, and no matrix has a rank over 4"),
        ({"rank_pattern": {"to_q": 10**9}}, "size mismatch: to_q is 1000000000"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern must give a value by a module's name"),
        ({"alpha_pattern": [1]}, "alpha_pattern must give a value by a module's name"),
        ({"lora_alpha": "x"}, "lora_alpha must be a finite number, got 'x'"),
        ({"megatron_config": {}, "megatron_core": "megatron.x"}, "megatron_core is set, which a plain LoRA has not"),
        ({"megatron_config": {"a": 1}}, "megatron_config is set"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base's own weights"),
        ({"init_lora_weights": "olora"}, "changes the base's own weights"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be text"),
        ({"peft_type": ["LORA"]}, "is no plain LoRA"),
    ],
)
def test_an_adapter_that_asks_for_more_than_a_lora(
    changes: dict[str, Any], message: str, lora: Path, policy: Policy, tmp_path: Path
) -> None:
    (lora / CONFIG).write_text(json.dumps(json.loads((lora / CONFIG).read_text()) | changes))
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    assert message in said(lambda: policy.load_adapter(lora), tmp_path)
    after = policy.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_pattern_of_an_adapter_is_not_searched_for(
    lora: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Backtracking over a module's name would take years; the weights say which modules they are of."""
    row = json.loads((lora / CONFIG).read_text()) | {"target_modules": "(([a-z0-9_]+)*.?)+!|.*to_[qkv]"}
    (lora / CONFIG).write_text(json.dumps(row))
    mine = Policy.load(str(tiny_folder("sd")))
    mine.load_adapter(lora)
    assert sum(".lora_A." in name for name, _ in mine.network.named_parameters()) == sum(
        ".lora_A." in name for name in load_file(lora / WEIGHTS)
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"unet.megatron_core": "megatron.x"}, "settings in the header: megatron_core is set"),
        ({"unet.init_lora_weights": "pissa"}, "settings in the header: init_lora_weights = 'pissa'"),
        ({"unet.target_modules": "(a+)+$"}, "target_modules must list names, not be a pattern"),
        ({"unet.r": 10**9}, "size mismatch: r is 1000000000"),
        ([1], "settings in the header"),
        ("[" * 9999, "settings in the header"),
    ],
)
def test_a_header_that_asks_for_more_than_a_lora(
    header: Any, message: str, lora: Path, policy: Policy, tmp_path: Path
) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(load_file(lora / DIFFUSERS), lora / DIFFUSERS, metadata={"lora_adapter_metadata": text})
    assert message in said(lambda: policy.load_adapter(lora / DIFFUSERS), tmp_path)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(key for key in tensors if "lora_A" in key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {first(t): t[first(t)][:, 0].contiguous()}, "does not fit this base model"),
        (lambda t: t | {first(t): torch.tensor(1.0)}, "does not fit this base model"),
        (lambda t: t | {first(t): t[first(t)] / 0}, "holds NaN or an infinity"),
        (lambda t: t | {first(t): t[first(t)] * torch.nan}, "holds NaN or an infinity"),
        (lambda t: t | {"base_model.model.../../etc/passwd.lora_A.weight": torch.ones(4, 4)}, "no such layer"),
        (lambda t: t | {"base_model.model./etc/passwd.lora_A.weight": torch.ones(4, 4)}, "no such layer"),
        (lambda t: t | {"base_model.model.__class__.lora_A.weight": torch.ones(4, 4)}, "no such layer"),
        (lambda t: t | {"base_model.model.conv_norm_out.lora_A.weight": torch.ones(4, 4)}, "conv_norm_out"),
    ],
)
def test_weights_that_no_lora_has(
    change: Callable[[Any], Any], message: str, lora: Path, policy: Policy, tmp_path: Path
) -> None:
    save_file(change(load_file(lora / WEIGHTS)), lora / WEIGHTS)
    assert message in said(lambda: policy.load_adapter(lora), tmp_path)


@pytest.mark.parametrize("size", [2**40, 2**63, 100_000_000, 0])
def test_a_safetensors_header_that_claims_gigabytes(size: int, lora: Path, tmp_path: Path) -> None:
    data = (lora / WEIGHTS).read_bytes()
    (lora / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])
    assert "is damaged or cut short" in said(lambda: adapter_files.read(lora), tmp_path)
    shape = json.dumps({"a": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    (lora / WEIGHTS).write_bytes(struct.pack("<Q", len(shape)) + shape)
    assert "is damaged or cut short" in said(lambda: adapter_files.read(lora), tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"unet": ["os", "system"]}, "cannot load the base model"),
        ("model_index.json", {"unet": ["subprocess", "Popen"]}, "cannot load the base model"),
        ("model_index.json", {"unet": ["evil", "Evil"]}, "cannot load the base model"),
        ("model_index.json", {"_class_name": ["evil", "Evil"]}, "no backbone for list"),
        ("model_index.json", {"_class_name": "../../x"}, "no backbone for ../../x"),
        ("model_index.json", {"unet": 5}, "cannot load the base model"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("vae/config.json", {"block_out_channels": [32] * 5000}, "block_out_channels has 5000 entries"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**11}, "num_train_timesteps is 100000000000"),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}, "NaN is no finite number"),
    ],
)
def test_a_pipeline_that_runs_code_or_takes_the_memory(
    file: str,
    changes: dict[str, Any],
    message: str,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_folder("sd"), folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    assert message in said(lambda: Policy.load(str(folder)), tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("index", [{"weight_map": [1]}, {"weight_map": {"a": {}}}, {"weight_map": {"a": "../../x"}}])
def test_an_index_of_weights_that_points_elsewhere(
    index: dict, tiny_folder: Any, policy: Policy, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs" / "unet"
    shutil.copytree(tiny_folder("sd") / "unet", folder)
    (folder / "diffusion_pytorch_model.safetensors").rename(tmp_path / "x")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    answer = said(lambda: policy.load_tuned(folder.parent), tmp_path)
    assert "index.json is damaged: weight_map must" in answer or "names files that are missing: ['../../x']" in answer
