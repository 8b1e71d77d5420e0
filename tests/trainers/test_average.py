"""The mean of adapters: exact, in every family, and refused where adapters do not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlg import average
from rlg.io import manifest
from rlg.models import adapter_files, fingerprint, lora
from rlg.models.policy import Policy
from rlg.models.tuned_model import resolve


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
    layers = {name: m for name, m in network.named_modules() if m in set(lora.layers(network))}
    return {name: layer.get_delta_weight(adapter_files.NAME).detach() for name, layer in layers.items()}


def test_the_mean_of_updates_is_exact(
    family: str, checkpoints: Callable[..., list[Path]], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = checkpoints(family)
    average.main([*map(str, folders), "--output", str(tmp_path / "mean")])
    found = []
    for folder in (*folders, tmp_path / "mean", tmp_path / "mean" / adapter_files.DIFFUSERS_FILE):
        policy = Policy.load(str(tiny_folder(family)))
        policy.load_adapter(folder)
        found.append(updates(policy.network))
    assert found[0].keys() == found[2].keys() and len(found[0]) > 4
    for name, mean in found[2].items():
        torch.testing.assert_close(mean, (found[0][name] + found[1][name]) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[3][name], mean, rtol=1e-4, atol=1e-6)
        assert (mean - found[0][name]).abs().max() > 1e-3


def test_an_average_is_there_whole_or_not_at_all(
    checkpoints: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, output = checkpoints("sd3"), tmp_path / "out" / "mean"

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rlg.publishing.model_card.write", full)
        with pytest.raises(OSError, match="no space left"):
            average.average(folders, output)
    assert not list((tmp_path / "out").iterdir())
    average.average(folders, output)
    (output / "mine").write_text("")
    with pytest.raises(ValueError, match="exists; give --overwrite, or --output another folder"):
        average.average(folders, output)
    assert (output / "mine").is_file()
    average.average(folders, output, overwrite=True)
    assert manifest.fault(output) is None and [path.name for path in (tmp_path / "out").iterdir()] == ["mean"]
    found = json.loads((output / "average.json").read_text())["digests"]
    assert found == {
        "adapter 1": resolve(folders[0]).digest,
        "adapter 2": resolve(folders[1]).digest,
        "base": fingerprint.of_model(adapter_files.read(folders[0]).base),
    }


def test_checkpoints_of_two_bases_of_one_name_have_no_average(
    checkpoints: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folders = checkpoints("sd3")
    for folder, digest in zip(folders, "ab", strict=True):
        (folder / "state.json").write_text(json.dumps({"digests": {"base": digest}}))
    with pytest.raises(ValueError, match="were trained on 2 different bases of one name"):
        average.average(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_the_run_s_settings_come_along(checkpoints: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = checkpoints("sd3")
    (folders[0] / "config.yaml").write_text("steps: 6\n")
    average.average(folders, tmp_path / "mean")
    assert (tmp_path / "mean" / "config.yaml").read_text() == "steps: 6\n"


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
        folders[1] / adapter_files.DIFFUSERS_FILE: "is no PEFT adapter",
    }
    for second, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            average.main([str(folders[0]), str(second), "--output", str(tmp_path / "mean")])
        assert stopped.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert message in said and not (tmp_path / "mean").exists()
    with pytest.raises(
        ValueError, match=r"exists, and is no average \(no average.json\); give --output another folder"
    ):
        average.average(folders, tmp_path / "other-rank", overwrite=True)
    assert (tmp_path / "other-rank" / adapter_files.DIFFUSERS_FILE).is_file()
