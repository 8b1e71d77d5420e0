"""The mean of adapters: exact, in every family, and refused where adapters do not belong together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlg import adapters, average
from rlg.policy import Policy


@pytest.fixture
def checkpoints(tiny_policy: Callable[..., Policy], tmp_path: Path) -> Callable[..., list[Path]]:
    """Two adapters of a family, with different weights."""

    def make(family: str) -> list[Path]:
        policy, folders = tiny_policy(family), []
        for i in range(2):
            for parameter in policy.trainable():
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(parameter) + i))
            folders.append(tmp_path / f"checkpoint-{i}")
            policy.save_adapter(folders[-1])
        return folders

    return make


def updates(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each LoRA layer adds to its weight."""
    layers = {name: m for name, m in network.named_modules() if m in set(adapters.lora_layers(network))}
    return {name: layer.get_delta_weight(adapters.NAME).detach() for name, layer in layers.items()}


def test_the_mean_of_updates_is_exact(
    family: str, checkpoints: Callable[..., list[Path]], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = checkpoints(family)
    average.main([*map(str, folders), "--output", str(tmp_path / "mean")])
    found = []
    for folder in (*folders, tmp_path / "mean", tmp_path / "mean" / adapters.DIFFUSERS_FILE):
        policy = Policy.load(str(tiny_folder(family)))
        policy.load_adapter(folder)
        found.append(updates(policy.network))
    assert found[0].keys() == found[2].keys() and len(found[0]) > 4
    for name, mean in found[2].items():
        torch.testing.assert_close(mean, (found[0][name] + found[1][name]) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[3][name], mean, rtol=1e-4, atol=1e-6)
        assert (mean - found[0][name]).abs().max() > 1e-3


def test_the_run_s_settings_come_along(checkpoints: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = checkpoints("sd3")
    (folders[0] / "config.yaml").write_text("num_steps: 6\n")
    average.average(folders, tmp_path / "mean")
    assert (tmp_path / "mean" / "config.yaml").read_text() == "num_steps: 6\n"


def test_what_does_not_belong_together_is_refused(
    checkpoints: Callable[..., list[Path]],
    tiny_policy: Callable[..., Policy],
    tiny_checkpoint: Callable[[str], Path],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folders = checkpoints("sd3")
    other = Policy.load(str(tiny_folder("sd3")))
    other.add_lora(rank=2, alpha=8)
    other.save_adapter(tmp_path / "other-rank")
    cases = {
        tmp_path / "other-rank": "has another rank, alpha or set of layers",
        tiny_checkpoint("sd"): "was trained on",
        tmp_path / "none": "no such checkpoint",
        folders[1] / adapters.DIFFUSERS_FILE: "is no PEFT adapter",
    }
    for second, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            average.main([str(folders[0]), str(second), "--output", str(tmp_path / "mean")])
        assert stopped.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert message in said and not (tmp_path / "mean").exists()
    with pytest.raises(ValueError, match="exists; give --output another folder"):
        average.average(folders, tmp_path / "other-rank")
