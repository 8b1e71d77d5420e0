"""A tuned model is found once: the hub is listed once, and an adapter is read and hashed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi

import rlg
from rlg import evaluate, grid, sample
from rlg.models import adapter_files, fingerprint
from rlg.models.adapter_files import DIFFUSERS_FILE
from rlg.models.policy import Policy
from rlg.models.tuned_model import resolve
from tests.support import fake_hub

REPO, OTHER = "someone/first", "someone/second"
SMALL = ["--num_prompts", "2", "--k", "1", "--steps", "1", "--cfg", "1", "--kernel", "ode"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """A hub on this machine, and an empty cache for what comes from it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with fake_hub.serve() as served:
        api = HfApi(endpoint=served.url)
        for name in ("list_repo_files", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(api, name))
        yield served


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Files of adapters that were read, and that were hashed, once each time."""
    found: dict[str, list[str]] = {"read": [], "hashed": []}
    load_file, of_files = adapter_files.load_file, fingerprint.of_files

    def read(file: Path) -> Any:
        found["read"].append(Path(file).name)
        return load_file(file)

    def hashed(files: Any, *more: Any) -> str | None:
        found["hashed"] += [name for name in files if name == DIFFUSERS_FILE]
        return of_files(files, *more)

    monkeypatch.setattr(adapter_files, "load_file", read)
    monkeypatch.setattr(fingerprint, "of_files", hashed)
    return found


@pytest.fixture
def published(hub: fake_hub.FakeHub, tiny_checkpoint: Callable[[str], Path]) -> fake_hub.FakeHub:
    """Two repositories, each with an adapter as diffusers writes it."""
    data = (tiny_checkpoint("sd3") / DIFFUSERS_FILE).read_bytes()
    hub.published = {repo: {DIFFUSERS_FILE: data, "README.md": b"#"} for repo in (REPO, OTHER)}
    return hub


def test_a_model_is_listed_when_it_is_found_and_read_when_it_is_asked_for(
    published: fake_hub.FakeHub, counted: dict[str, list[str]]
) -> None:
    model = resolve(REPO)
    assert (model.path, model.is_network, model.source.repo) == (REPO, False, REPO)
    assert resolve(model) is model
    assert (published.listed, counted["read"]) == ([REPO], [])
    assert model.adapter is model.adapter and model.base is None  # a diffusers file names none
    assert model.digest == model.digest
    assert (published.listed, counted) == ([REPO], {"read": [DIFFUSERS_FILE], "hashed": [DIFFUSERS_FILE]})
    with pytest.raises(FrozenInstanceError):
        model.path = OTHER


def test_a_path_is_resolved_as_a_hub_id_is(
    tiny_checkpoint: Callable[[str], Path], tiny_folder: Callable[[str], Path]
) -> None:
    ours, network = resolve(tiny_checkpoint("sd3")), resolve(tiny_folder("sd3"))
    assert not ours.is_network and ours.base == str(tiny_folder("sd3"))
    assert ours.file == tiny_checkpoint("sd3") / "adapter" / adapter_files.PEFT_WEIGHTS
    assert network.is_network and network.base is None
    assert network.digest == fingerprint.of_model(str(tiny_folder("sd3") / "transformer"))
    with pytest.raises(ValueError, match="no such checkpoint: nothing"):
        resolve("nothing")


@pytest.mark.parametrize("options", [[], ["--correct"]], ids=["diffusers", "own sampler"])
def test_sampling_asks_once(
    options: list[str], published: fake_hub.FakeHub, counted: dict[str, list[str]], tiny_folder: Callable[[str], Path]
) -> None:
    small = ["--prompt", "a red circle", "--k", "1", "--steps", "1", "--w", "2", "--output", "grid.png"]
    sample.main(["--tuned", REPO, "--base", str(tiny_folder("sd3")), *small, *options])
    assert (published.listed, counted["read"]) == ([REPO], [DIFFUSERS_FILE])


def test_a_guide_asks_once(
    published: fake_hub.FakeHub, counted: dict[str, list[str]], tiny_folder: Callable[[str], Path]
) -> None:
    pipe = Policy.load(str(tiny_folder("sd3"))).pipe
    rlg.apply(pipe, REPO).unload()
    assert (published.listed, counted["read"]) == ([REPO], [DIFFUSERS_FILE])


def test_training_one_policy_leaves_the_model_and_others_alone(
    tiny_checkpoint: Callable[[str], Path], tiny_folder: Callable[[str], Path]
) -> None:
    model = resolve(tiny_checkpoint("sd3"))
    before = {name: tensor.clone() for name, tensor in model.adapter.tensors.items()}
    settings = model.adapter.config.to_dict()
    first, second = (Policy.load(str(tiny_folder("sd3"))) for _ in range(2))
    first.load_adapter(model)
    second.load_adapter(model)
    kept = [parameter.detach().clone() for parameter in second.trainable()]
    with torch.no_grad():
        for parameter in first.trainable():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(kept, second.trainable(), strict=True))
    assert all(torch.equal(model.adapter.tensors[name], tensor) for name, tensor in before.items())
    first.network.peft_config[adapter_files.NAME].base_model_name_or_path = "changed"
    assert model.adapter.config.to_dict() == settings


def test_an_evaluation_asks_once(
    published: fake_hub.FakeHub, counted: dict[str, list[str]], tiny_folder: Callable[[str], Path]
) -> None:
    evaluate.main(["--tuned", REPO, "--base", str(tiny_folder("sd3")), "--w", "0", "1", *SMALL])
    assert (published.listed, counted) == ([REPO], {"read": [DIFFUSERS_FILE], "hashed": [DIFFUSERS_FILE]})


def test_a_blend_asks_once_for_each(
    published: fake_hub.FakeHub, counted: dict[str, list[str]], tiny_folder: Callable[[str], Path]
) -> None:
    """The model trained on a mix is an expert here, and is not looked for again."""
    pair = ["--tuned", REPO, "--tuned", OTHER, "--morl", OTHER, "--blend", "0:1:1"]
    rewards = ["--reward", "jpeg_compressibility", "jpeg_incompressibility"]
    evaluate.main([*pair, "--base", str(tiny_folder("sd3")), *rewards, *SMALL])
    assert published.listed == [REPO, OTHER]
    assert counted == {"read": [DIFFUSERS_FILE] * 2, "hashed": [DIFFUSERS_FILE] * 2}


def test_a_grid_asks_once_for_all_its_rows(
    published: fake_hub.FakeHub, counted: dict[str, list[str]], tiny_folder: Callable[[str], Path]
) -> None:
    axis = ["--axis", "steps", "--values", "1", "2", "--w", "1", "2", "--method", "rlg"]
    few = [*SMALL[:4], *SMALL[6:]]
    grid.main(["--tuned", REPO, "--base", str(tiny_folder("sd3")), *axis, *few])
    assert (published.listed, counted) == ([REPO], {"read": [DIFFUSERS_FILE], "hashed": [DIFFUSERS_FILE]})
