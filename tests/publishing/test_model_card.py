"""Model cards: what they say, that no text escapes, whose they are; and publishing them, to a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from rlg import evaluate as evaluation
from rlg import push
from rlg.models import adapter_files
from rlg.publishing import hub_names, hub_upload, model_card
from tests.support import fake_hub
from trainers.checkpoints.checkpoint_folder import checkpoints
from trainers.grpo import GRPOTrainer

Make = Callable[..., GRPOTrainer]
HOSTILE = "a|b `c` <img src=x onerror=alert(1)> [x](javascript:y) *z*\n# head\n```\nend"
CONFIG = {
    "base": "stabilityai/stable-diffusion-3.5-medium",
    "name": "demo",
    "reward": ["pickscore=/home/someone/models/pick", "ocr"],
    "reward_weights": [1.0, 0.5],
    "held_out_reward": ["imagereward"],
    "prompts": "/home/someone/prompts.txt",
    "output_dir": "/home/someone/runs",
    "beta": 0.04,
    "seed": 7,
}
POINT = {"method": "rlg", "n": 8, "kl": 1.25, "rewards": {"ocr": {"mean": 0.5, "ci95": [0.25, 0.75]}}}


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """An adapter in a run's folder, with the config of a published base."""
    folder = tmp_path / "runs" / "demo" / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("sd3"), folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "trainer_state").mkdir()
    (folder / "trainer_state" / "lora.safetensors").write_bytes(b"state")
    return folder


def evaluated(checkpoint: Path, name: str = "a b", **meta: Any) -> Path:
    folder = checkpoint.parent / "eval" / name
    folder.mkdir(parents=True)
    row = {"trained_rewards": ["ocr"], "num_prompts": 4, "k": 2, "prompts": "/x/test.txt", "steps": 10, "cfg": 4.5}
    points = [POINT | {"w": w} for w in (0.0, 1.0, 2.5)]
    summary = {"base": "b", "adapter": f"runs/demo/{checkpoint.name}", "points": points}
    (folder / "summary.json").write_text(json.dumps(summary | {"meta": row | {"sampler": "sde"} | meta}))
    (folder / "curves.png").write_bytes(b"png of " + name.encode())
    return folder


def written(folder: Path, **options: Any) -> str:
    model_card.write(folder, **options)
    return (folder / "README.md").read_text()


def test_what_a_card_says(checkpoint: Path) -> None:
    card = written(checkpoint)
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == CONFIG["base"] and data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert (data["license"], data["license_name"]) == ("other", "license-of-the-base-model")
    assert data["license_link"] == f"https://huggingface.co/{CONFIG['base']}"
    assert {"lora", "peft", "reinforcement-learning"} <= set(data["tags"])
    assert "# demo, checkpoint-3\n" in card
    for row in (
        "| base model | stabilityai/stable-diffusion-3.5-medium |",
        "| reward | 1 × pickscore, 0.5 × ocr |",
        "| held-out rewards | imagereward |",
        "| beta | 0.04 |",
        "| training data | prompts.txt |",
        "| LoRA rank, alpha | 4, 8 |",
    ):
        assert row in card
    assert "(stabilityai/stable-diffusion-3.5-medium, stabilityai-ai-community) applies" in card
    assert "It has not been evaluated yet." in card
    assert "/home/someone" not in card and "output_dir" not in card
    block = card.partition("## Configuration\n\n```yaml\n")[2].partition("\n```")[0]
    assert yaml.safe_load(block)["reward"] == ["pickscore", "ocr"]


def test_a_card_has_the_curve_of_its_own_evaluations(checkpoint: Path) -> None:
    evaluated(checkpoint, created="2")
    evaluated(checkpoint, "older", created="1", schedule="linear_down")
    evaluated(checkpoint, "blend", blend_scale=1.0)
    other = evaluated(checkpoint, "of another")
    text = (other / "summary.json").read_text()
    (other / "summary.json").write_text(text.replace("checkpoint-3", "checkpoint-4"))
    (checkpoint.parent / "eval" / "broken").mkdir()
    (checkpoint.parent / "eval" / "broken" / "summary.json").write_text("{")
    card = written(checkpoint)
    assert card.count("| 2.5 | 0.5000 &#91;0.2500, 0.7500&#93; | 1.25 |") == 2
    assert card.count("| w | ocr &#40;trained&#41; | KL &#40;nats&#41; |") == 2
    head = "4 prompts of test.txt, 2 images each, sde 10 steps, CFG 4.5"
    assert card.index(f"### {head}, schedule linear&#95;down\n") < card.index(
        f"### {head}\n\n![curves](../eval/a%20b/"
    )


def test_the_code_of_a_card_runs(tiny_checkpoint: Callable[[str], Path], tiny_folder: Any, tmp_path: Path) -> None:
    """What the card tells to type, for a base and an adapter that are here; w = 1 is what diffusers alone gives."""
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(tiny_checkpoint("sd3"), folder)
    card = written(folder)
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "from_pretrained('path/of/the/base')" in code  # a folder that others don't have is not named
    code = code.replace("'path/of/the/base'", repr(str(tiny_folder("sd3")))).replace("path/or/hub-id", str(folder))
    draw = (
        'pipe("a prompt", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images'
    )
    first, second = code.replace('image = pipe("a prompt").images[0]\n', "").split("\n\n#")
    ours, theirs = {"torch": torch}, {"torch": torch}
    exec(f"{first}\nguided = {draw}\nguide.scale = 1\ntuned = {draw}", ours)
    exec(f"from diffusers import DiffusionPipeline\n#{second}\ntuned = {draw}", theirs)
    assert torch.allclose(torch.as_tensor(ours["tuned"]), torch.as_tensor(theirs["tuned"]), atol=1e-5)
    assert not torch.allclose(torch.as_tensor(ours["guided"]), torch.as_tensor(theirs["tuned"]), atol=1e-3)


def test_text_stays_text(checkpoint: Path) -> None:
    config = CONFIG | {
        "name": HOSTILE,
        "reward": [HOSTILE],
        "reward_weights": None,
        "prompts": HOSTILE,
        "note": HOSTILE,
    }
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config | {"base": f"x/y\nlicense: mit\n{HOSTILE}"}))
    evaluated(checkpoint, HOSTILE.replace("/", "").replace("\n", ""), prompts=HOSTILE, trained_rewards=[HOSTILE])
    card = written(checkpoint)
    assert ModelCard(card).data.license == "other"
    prose, _, block = card.partition("## Configuration\n\n")
    prose, _, code = prose.partition(model_card.MARK)[2].partition("## How to load")
    prose += code.partition("\n\n## What w does")[2]
    assert "## License" in prose and "### " in prose
    for bad in ("<img", "](javascript", "*z*", "\n# head", "`c`", "a|b"):
        assert bad not in prose
    fence = block.partition("yaml\n")[0]
    assert set(fence) == {"`"} and len(fence) > 3  # longer than any inside: it ends where we end it
    assert block.count(f"\n{fence}") == 1 and block.endswith(f"\n{fence}\n")
    assert yaml.safe_load(block[len(fence) + 5 :].rpartition(f"\n{fence}")[0])["note"] == HOSTILE


def test_a_card_of_the_users_own_is_left_alone(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("mine")
    assert written(checkpoint) == "mine"
    model_card.update(checkpoint)
    assert (checkpoint / "README.md").read_text() == "mine"
    (checkpoint / "README.md").unlink()
    model_card.update(checkpoint)
    assert not (checkpoint / "README.md").exists()  # an adapter that never had one


def test_a_license_is_stated_where_someone_gave_one(checkpoint: Path) -> None:
    card = written(checkpoint, license="apache-2.0")
    assert ModelCard(card).data.license == "apache-2.0"
    assert "license_name" not in ModelCard(card).data.to_dict()
    assert "The adapter: apache-2.0." in card and "stabilityai-ai-community" in card
    assert ModelCard(written(checkpoint)).data.license == "apache-2.0"  # the earlier card's
    (checkpoint / "README.md").unlink()
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"adapter_license": "mit"}))
    assert ModelCard(written(checkpoint)).data.license == "mit"
    for wrong in ("Apache 2.0", "", "mit\nbase_model: x"):
        with pytest.raises(ValueError, match="the license must be an id of the hub's"):
            hub_names.check_license(wrong)


def test_the_license_of_a_base(tmp_path: Path) -> None:
    assert model_card.base_license("tiny-sd3") == "apache-2.0"
    assert model_card.base_license("some/base-nobody-has") is None
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: house-rules\n---\n")
    assert model_card.base_license(str(tmp_path)) == "house-rules"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert model_card.base_license(str(tmp_path)) is None


def test_training_writes_it_and_an_evaluation_brings_it_up_to_date(tiny_trainer: Make, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue crosses\n")
    options = {"beta": 0.25}
    tiny_trainer("sd3", max_steps=1, adapter_license="mit", **options).train()
    (made,) = checkpoints(tmp_path / "run")
    card = (made / "README.md").read_text()
    assert "# run, checkpoint-1\n" in card and "| beta | 0.25 |" in card and "not been evaluated" in card
    assert ModelCard(card).data.license == "mit"
    arguments = ["--k", "1", "--w", "0", "1", "--method", "rlg", "--steps", "2", "--batch_size", "4"]
    arguments += ["--prompts", str(tmp_path / "prompts.txt")]
    evaluation.main(["--ckpt", str(made), "--reward", "jpeg_compressibility", *arguments])
    card = (made / "README.md").read_text()
    assert "not been evaluated" not in card and "2 prompts of prompts.txt, 1 images each, sde 2 steps" in card
    again = tiny_trainer("sd3", max_steps=2, resume=True, adapter_license="mit", **options)
    again.train()  # a card that changed does not make a checkpoint broken
    assert [c.name for c in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


# Publishing


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """A hub on this machine, in place of the real one, and a token for it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with fake_hub.serve() as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        yield served


def test_push(checkpoint: Path, hub: fake_hub.FakeHub, capsys: pytest.CaptureFixture) -> None:
    evaluated(checkpoint)
    push.main(["--ckpt", str(checkpoint), "--repo", "someone/demo", "--private", "--license", "openrail"])
    assert capsys.readouterr().out.strip() == f"{hub.url}/someone/demo"
    (created,) = hub.created
    assert (created["name"], created["organization"]) == ("demo", "someone")
    assert created.get("visibility", created.get("private")) in ("private", True)
    assert hub.tokens == {"Bearer hf_secret"} and hub.message == "Upload checkpoint-3"
    adapter = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", adapter_files.DIFFUSERS_FILE)
    assert set(hub.files) == {*adapter, "README.md", "eval/a b/curves.png"}  # no state, no config
    for name in adapter[1:]:
        assert hub.files[name] == (checkpoint / name).read_bytes()
    settings = json.loads((checkpoint / adapter[0]).read_bytes())
    assert json.loads(hub.files[adapter[0]]) == settings | {"base_model_name_or_path": None}  # a folder of ours
    assert hub.files["eval/a b/curves.png"] == b"png of a b"
    card = hub.files["README.md"].decode()
    assert "![curves](eval/a%20b/curves.png)" in card and ModelCard(card).data.license == "openrail"
    assert "![curves](../eval/a%20b/curves.png)" in (checkpoint / "README.md").read_text()


def test_a_card_of_ones_own_is_pushed_as_it_is(checkpoint: Path, hub: fake_hub.FakeHub) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nmine")
    hub_upload.push(checkpoint, "demo")
    assert hub.files["README.md"] == b"---\nlicense: mit\n---\nmine"
    assert "organization" not in hub.created[0] or hub.created[0]["organization"] is None


def stopped(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        push.main(list(arguments))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_what_can_not_be_pushed(
    checkpoint: Path, hub: fake_hub.FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    at = ["--ckpt", str(checkpoint), "--repo"]
    assert "no checkpoint with an adapter" in stopped(capsys, "--ckpt", str(tmp_path), "--repo", "a/b")
    assert "Repo id must" in stopped(capsys, *at, "a/b/c")
    assert "license must be an id" in stopped(capsys, *at, "a/b", "--license", "My License")
    hub.refusal = 403
    line = stopped(capsys, *at, "a/b")
    assert line.startswith("cannot push to a/b: ") and line.endswith(
        f"python -m rlg.push --ckpt {checkpoint} --repo a/b"
    )
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert stopped(capsys, *at, "a/b").startswith("cannot push to a/b: ")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert stopped(capsys, *at, "a/b") == "pushing needs a token of the hub: `hf auth login`, or the variable HF_TOKEN"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in stopped(capsys, *at, "a/b")
    assert not hub.files


def test_training_pushes_its_last_adapter(tiny_trainer: Make, hub: fake_hub.FakeHub, tmp_path: Path) -> None:
    tiny_trainer(
        "sd3", max_steps=2, save_steps=1, push_to_hub=True, hub_model_id="me/it", hub_private_repo=True
    ).train()
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "it")
    assert hub.message == "Upload checkpoint-2"
    file = "adapter/adapter_model.safetensors"
    assert hub.files[file] == (tmp_path / "run" / "checkpoint-2" / file).read_bytes()


def test_training_that_can_not_push_is_refused_before_it_begins(
    tiny_trainer: Make, hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainers.core.start import check_publishing

    with pytest.raises(ValueError, match="Repo id must"):
        tiny_trainer("sd3", push_to_hub=True, hub_model_id="a/b/c")
    with pytest.raises(ValueError, match="license must be an id"):
        tiny_trainer("sd3", adapter_license="My License")
    trainer = tiny_trainer("sd3", push_to_hub=True, max_steps=1)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="pushing needs a token"):
        check_publishing(trainer.config, trainer.accelerator)
    with pytest.raises(ValueError, match="pushing needs a token"):
        trainer.train()  # the token went while it ran: the checkpoint is there
    assert [c.name for c in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
