"""Digests of what results are made of: a path that holds something else is noticed, whatever it is of."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlg import evaluate
from rlg.evaluation.folder import prepare_folder
from rlg.evaluation.rows import read_rows
from rlg.models import fingerprint
from rlg.prompts import Prompt
from rlg.tasks import prompt_sets

SMALL = "--steps 1 --kernel ode --cfg 1 --k 1 --method rlg --batch_size 6 --images 0 --reward jpeg_compressibility"


def test_digests_by_hand(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("not the model")
    lines = [("a.safetensors", b"weights"), ("b.json", b"{}")]
    listing = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in lines)
    assert fingerprint.of_model(str(tmp_path)) == hashlib.sha256(listing.encode()).hexdigest()
    assert fingerprint.of_model(str(tmp_path / "nothing")) is None
    assert fingerprint.of_model("nobody/nothing") is None


def test_a_file_of_the_hubs_cache_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sha256 of a blob is its name, so gigabytes are not read again; the content here is another."""
    cache = tmp_path / "models--some--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / ("ab" * 32)).write_bytes(b"x")
    (cache / "snapshots" / "c").mkdir(parents=True)
    (cache / "snapshots" / "c" / "model.safetensors").symlink_to(cache / "blobs" / ("ab" * 32))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    line = f"{'ab' * 32}  model.safetensors\n"
    assert fingerprint.of_model("some/model") == hashlib.sha256(line.encode()).hexdigest()


def test_prompts_are_known_by_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red circle\ntwo crosses\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "two crosses"}\n')
    text, lines = (fingerprint.of_prompts(prompt_sets.load(str(tmp_path / name))) for name in ("a.txt", "b.jsonl"))
    assert text == lines
    other = [Prompt("a red circle"), Prompt("two crosses", {"tag": "count"})]
    assert fingerprint.of_prompts(other) != text != fingerprint.of_prompts(other[::-1])


@pytest.mark.parametrize("size", [10, 3 * 2**20])
def test_a_change_of_a_large_data_file_shows_at_its_ends(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE", 2 * 2**20)
    data = bytearray(size)
    (tmp_path / "train.parquet").write_bytes(data)
    found = [fingerprint.of_data(tmp_path)]
    for place in (0, size - 1, None):
        if place is None:
            data.append(0)
        else:
            data[place] = 1
        (tmp_path / "train.parquet").write_bytes(data)
        found.append(fingerprint.of_data(tmp_path))
    assert len(set(found)) == 4


def test_differences_are_named() -> None:
    before = {"digests": {"adapter": "a" * 64, "base": "b" * 64}, "versions": {"torch": "2.6.0", "rlg": "1"}}
    now = {"digests": {"adapter": "c" * 64, "prompts": "d" * 64}, "versions": {"torch": "2.7.0", "rlg": "1"}}
    assert fingerprint.differences(before, now) == [
        f"adapter is not what it was (sha256 {'a' * 12}, now {'c' * 12})",
        "torch was 2.6.0, and is 2.7.0",
    ]
    assert fingerprint.differences(before, before) == fingerprint.differences({}, now) == []


def test_versions_are_those_that_are_installed() -> None:
    import diffusers
    import PIL
    import torch

    import rlg

    found = fingerprint.versions(["PIL", "no_such_module"])
    assert (found["torch"], found["diffusers"], found["rlg"]) == (
        torch.__version__,
        diffusers.__version__,
        rlg.__version__,
    )
    assert found["PIL"] == PIL.__version__ and "no_such_module" not in found


def edited(file: Path) -> None:
    file.write_text("something else entirely\n" + file.read_text().partition("\n")[2])


def scaled(file: Path) -> None:
    save_file({key: -3 * tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture
def places(tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with a base, an adapter and prompts of its own, which may be changed."""
    shutil.copytree(tiny_folder("sd3"), tmp_path / "base")
    shutil.copytree(tiny_checkpoint("sd3"), tmp_path / "ckpt")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue crosses\n")
    return tmp_path


CHANGES: dict[str, Callable[[Path], None]] = {
    "prompts": lambda at: edited(at / "prompts.txt"),
    "adapter": lambda at: scaled(at / "ckpt" / "adapter" / "adapter_model.safetensors"),
    "base": lambda at: scaled(at / "base" / "vae" / "diffusion_pytorch_model.safetensors"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_evaluation_goes_on_with_the_same_files_alone(
    what: str, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paths stay, their content does not: rows of two models must not end in one curve."""
    options = {"--ckpt": places / "ckpt", "--base": places / "base", "--prompts": places / "prompts.txt"}
    command = [text for pair in options.items() for text in map(str, pair)]
    command += [*SMALL.split(), "--output", str(places / "eval"), "--w", "0"]
    evaluate.main([*command, "1"])
    before = (places / "eval" / "scores.jsonl").read_bytes()
    evaluate.main([*command, "1"])  # nothing has changed: it goes on
    CHANGES[what](places)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*command, "1", "2"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2
    assert f"{places / 'eval'} was made of something else: {what} is not what it was (sha256 " in line
    assert line.endswith("give --output another folder, or --overwrite")
    assert (places / "eval" / "scores.jsonl").read_bytes() == before
    evaluate.main([*command, "1", "2", "--overwrite"])
    assert {row.w for row in read_rows(places / "eval" / "scores.jsonl")} == {0.0, 1.0, 2.0}


def test_a_base_that_has_changed_since_the_training_is_noticed(places: Path, capsys: Any) -> None:
    adapter = places / "ckpt" / "adapter" / "adapter_config.json"
    row = json.loads(adapter.read_text()) | {"base_model_name_or_path": str(places / "base")}
    adapter.write_text(json.dumps(row))
    digests = {"base": fingerprint.of_model(str(places / "base"))}
    (places / "ckpt" / "state.json").write_text(json.dumps({"digests": digests}))
    CHANGES["base"](places)
    command = ["--ckpt", str(places / "ckpt"), "--prompts", str(places / "prompts.txt"), *SMALL.split()]
    command += ["--w", "0", "--output", str(places / "eval")]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(command)
    assert stopped.value.code == 2 and not (places / "eval").exists()
    assert f"was trained on another {places / 'base'} than is there (sha256 " in capsys.readouterr().err
    evaluate.main([*command, "--base", str(places / "base")])


def test_an_evaluation_of_other_versions_is_refused(tmp_path: Path) -> None:
    prepare_folder(tmp_path, {"versions": {"torch": "2.6.0"}}, overwrite=False)
    with pytest.raises(ValueError, match=r"torch was 2\.6\.0, and is 2\.7\.0; give --output another folder"):
        prepare_folder(tmp_path, {"versions": {"torch": "2.7.0"}}, overwrite=False)


def test_an_evaluation_that_does_not_say_what_it_was_made_of_goes_on_with_a_word(tmp_path: Path) -> None:
    prepare_folder(tmp_path, {}, overwrite=False)
    with pytest.warns(UserWarning, match="does not say what it was made of"):
        prepare_folder(tmp_path, {"digests": {"base": "a"}, "versions": {}}, overwrite=False)
    assert "digests" not in json.loads((tmp_path / "meta.json").read_text())  # of rows that nobody knows


def test_a_rewards_model_is_part_of_it(tmp_path: Path) -> None:
    from rewards import places as models

    file = tmp_path / "head.pth"
    file.write_bytes(b"one")
    names = [f"aesthetic={file}", "jpeg_compressibility", "pickscore", "remote=http://127.0.0.1:1"]
    found: dict[str, Any] = models(names)
    assert found == {"aesthetic": str(file), "pickscore": "yuvalkirstain/PickScore_v1"}
    first = fingerprint.record({}, "tiny-sd3", {}, found)["digests"]
    assert first.keys() == {"base", "reward aesthetic"}
    file.write_bytes(b"two")
    assert fingerprint.record({}, "tiny-sd3", {}, found)["digests"]["reward aesthetic"] != first["reward aesthetic"]
