"""The step-aware preference model: the released layout, what time does, its training, and SPO judged by it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rewards import step_aware
from rewards.step_aware import StepAwareModel
from rlg.diffusion import process
from rlg.tinyworld import networks
from tests.conftest import PROMPTS
from tests.support.other_families import t5
from trainers.spm import AWARE, BLIND, FIGURE, REPORT, SPMConfig, SPMTrainer, spm_loss

Make = Callable[..., SPMTrainer]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return networks.build_tokenizer()


@pytest.fixture
def tiny_model(tokenizer: PreTrainedTokenizerBase) -> StepAwareModel:
    """Time matters to it."""
    torch.manual_seed(0)
    model = StepAwareModel(step_aware.tiny_config(tokenizer), tokenizer)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pairs in which the bright image won, for both splits."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(8):
        images = [_png(level, 2 * i + side) for side, level in enumerate((0.8, 0.2))]
        label = float(i % 2)
        jpgs = images if label else images[::-1]
        rows.append({"jpg_0": jpgs[0], "jpg_1": jpgs[1], "label_0": label, "label_1": 1 - label})
        rows[-1]["caption"] = PROMPTS[i % 3].text
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def _png(level: float, seed: int) -> bytes:
    pixels = 255 * (level + 0.2 * torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(seed)) - 0.1)
    file = io.BytesIO()
    Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(file, "png")
    return file.getvalue()


@pytest.fixture
def tiny_spm(tiny_folder: Callable[[str], Path], pairs_folder: Path, tmp_path: Path) -> Make:
    def make(family: str = "sd3", **options: Any) -> SPMTrainer:
        tiny = {
            "base": str(tiny_folder(family)),
            "name": "spm",
            "output_dir": str(tmp_path),
            "data": str(pairs_folder),
            "clip": "tiny",
            "dtype": "float32",
            "cfg": 1.0,
            "learning_rate": 1e-3,
            "accumulation_steps": 1,
            "batch_size": 4,
            "max_steps": 2,
            "test_bins": 2,
        }
        return SPMTrainer(SPMConfig(**tiny | options))

    return make


def images(count: int = 2, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def score(model: StepAwareModel, t: float, count: int = 2) -> Tensor:
    return model.score(images(count), [p.text for p in PROMPTS[:count]], [{}] * count, torch.full((count,), t))


def test_names_and_shapes_are_those_of_the_released_weights() -> None:
    """SPO's repository: spo/preference_models/models/time_conditioned_clip.py, around transformers' CLIP ViT-H/14."""
    with torch.device("meta"):
        model = StepAwareModel(step_aware.clip_h_config())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    vision, text = "model.vision_model", "model.text_model"
    expected = {
        "model.logit_scale": (),
        "model.t_embedder.mlp.0.weight": (1280, 256),
        "model.t_embedder.mlp.0.bias": (1280,),
        "model.t_embedder.mlp.2.weight": (1280, 1280),
        "model.t_embedder.mlp.2.bias": (1280,),
        "model.visual_projection.weight": (1024, 1280),
        "model.text_projection.weight": (1024, 1024),
        f"{vision}.adaLN_modulation.1.weight": (2 * 1280, 1280),
        f"{vision}.adaLN_modulation.1.bias": (2 * 1280,),
        f"{vision}.encoder.layers.31.adaLN_modulation.1.weight": (6 * 1280, 1280),
        f"{vision}.encoder.layers.31.adaLN_modulation.1.bias": (6 * 1280,),
        f"{vision}.encoder.layers.31.self_attn.out_proj.weight": (1280, 1280),
        f"{vision}.encoder.layers.0.mlp.fc1.weight": (5120, 1280),
        f"{vision}.embeddings.class_embedding": (1280,),
        f"{vision}.embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        f"{vision}.embeddings.position_embedding.weight": (257, 1280),
        f"{vision}.pre_layrnorm.weight": (1280,),
        f"{vision}.post_layernorm.bias": (1280,),
        f"{text}.embeddings.token_embedding.weight": (49408, 1024),
        f"{text}.embeddings.position_embedding.weight": (77, 1024),
        f"{text}.encoder.layers.23.mlp.fc2.weight": (1024, 4096),
        f"{text}.final_layer_norm.weight": (1024,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    # 16 tensors a layer, and 2 of its modulation; the rest: text 4, vision 9, projections 2, scale 1, embedder 4
    assert len(shapes) == 24 * 16 + 32 * 18 + 4 + 9 + 2 + 1 + 4


def test_a_new_model_is_clip_at_all_times(tokenizer: PreTrainedTokenizerBase) -> None:
    model = StepAwareModel(step_aware.tiny_config(tokenizer), tokenizer).eval()
    prompts = [p.text for p in PROMPTS[:2]]
    with torch.no_grad():
        plain = model.model(input_ids=model.prompt_ids(prompts), pixel_values=model.pixels(images()))
    for t in (0.0, 999.0):
        assert torch.allclose(score(model, t), plain.logits_per_image.diag(), atol=1e-4)


def test_time_image_and_prompt_matter(tiny_model: StepAwareModel) -> None:
    at_0 = score(tiny_model, 0.0)
    assert (score(tiny_model, 500.0) - at_0).abs().min() > 1e-3
    assert torch.allclose(score(tiny_model, 0.0), at_0)
    swapped = tiny_model.score(images(), [p.text for p in PROMPTS[1::-1]], [{}] * 2, torch.zeros(2))
    assert (swapped - at_0).abs().min() > 1e-3
    alone = tiny_model.score(images()[1:], [PROMPTS[1].text], [{}], torch.zeros(1))
    assert torch.allclose(alone, at_0[1:], atol=1e-4)
    assert at_0.abs().max() <= tiny_model.model.logit_scale.exp() + 1e-4


def test_time_is_embedded_by_cosines_and_sines() -> None:
    embedder = step_aware.TimeEmbedder(8)
    embedder.mlp = torch.nn.Sequential(torch.nn.Identity())
    embedder.mlp[0].weight = torch.zeros(1)
    row = embedder(torch.tensor([7.0]))[0]
    assert row.shape == (256,)
    for place in (0, 1, 127):
        angle = 7 * 10_000 ** (-place / 128)
        assert row[[place, 128 + place]].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-5)


def test_gradients_reach_the_time_embedding(tiny_model: StepAwareModel) -> None:
    ids = tiny_model.prompt_ids([p.text for p in PROMPTS[:2]])
    tiny_model(tiny_model.pixels(images()), ids, torch.tensor([10.0, 800.0])).sum().backward()
    timed = [p for name, p in tiny_model.named_parameters() if "adaLN" in name or "t_embedder" in name]
    assert len(timed) == 4 + 2 + 4 * 2 and all(float(p.grad.abs().sum()) > 0 for p in timed)
    assert not [name for name, p in tiny_model.named_parameters() if p.grad is None]


@pytest.mark.parametrize(("parts", "value"), [((1, 4), -1.0), ((2, 5), 0.0)])
def test_modulations_are_shift_scale_and_gate(
    parts: tuple[int, int], value: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of attention, then of the MLP, whose biases are 0 here: a scale of -1 or a gate of 0 silences either."""
    model = StepAwareModel(step_aware.tiny_config(tokenizer), tokenizer).eval()
    vision, pixels, t_B = model.model.vision_model, model.pixels(images()), torch.zeros(2)
    for layer in vision.encoder.layers:
        for part in parts:
            layer.adaLN_modulation[1].bias.data.view(6, -1)[part] = value
    with torch.no_grad():
        silent = vision.post_layernorm(vision.pre_layrnorm(vision.embeddings(pixels))[:, 0])
        assert torch.allclose(model.image_embeddings(pixels, t_B), model.model.visual_projection(silent), atol=1e-5)
        shift, scale = vision.adaLN_modulation[1].bias.view(2, -1)
        shift.fill_(0.5)
        scale.fill_(1.0)
        pooled = model.model.visual_projection(2 * silent + 0.5)
        assert torch.allclose(model.image_embeddings(pixels, t_B), pooled, atol=1e-5)


def test_images_are_resized_by_the_shorter_side_cropped_and_normalised(tiny_model: StepAwareModel) -> None:
    wide = torch.zeros(1, 3, 128, 192)
    wide[:, 0] = torch.linspace(0, 1, 192)
    pixels = tiny_model.pixels(wide)
    assert pixels.shape == (1, 3, 64, 64)
    red = pixels[0, 0, 30] * 0.26862954 + 0.48145466
    assert red[[0, 63]].tolist() == pytest.approx([1 / 6, 5 / 6], abs=0.01)  # the middle two thirds
    assert float(pixels[0, 2].mean()) == pytest.approx(-0.40821073 / 0.27577711, rel=1e-5)


def test_save_and_load_give_the_same_scores(tiny_model: StepAwareModel, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "m")
    assert not list(tmp_path.rglob("*.bin"))
    again = step_aware.load(tmp_path / "m")
    assert torch.equal(score(again, 300.0), score(tiny_model, 300.0))
    assert not any(p.requires_grad for p in again.parameters())


def test_what_cannot_be_read_is_refused(tiny_model: StepAwareModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a pickle.*convert it to safetensors"):
        step_aware.load("hub/sd-v1-5_step-aware_preference_model.bin")
    with pytest.raises(ValueError, match="neither a folder nor"):
        step_aware.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot read"):
        step_aware.load(tmp_path)
    folder = tmp_path / "m"
    tiny_model.save(folder)
    state = load_file(folder / step_aware.WEIGHTS)
    changed = {
        "lacks 1 tensors, first model.t_embedder.mlp.0.bias": {
            k: v for k, v in state.items() if "mlp.0.bias" not in k
        },
        "also holds 1 tensors, first extra": state | {"extra": torch.zeros(1)},
        r"logit_scale has shape \(2,\) instead of \(\)": state | {"model.logit_scale": torch.zeros(2)},
    }
    for message, tensors in changed.items():
        save_file(tensors, folder / step_aware.WEIGHTS)
        with pytest.raises(ValueError, match=message):
            step_aware.load(folder)
    buffers = {"model.vision_model.embeddings.position_ids": torch.arange(65)[None]}  # of older transformers
    save_file(state | buffers, folder / step_aware.WEIGHTS)
    assert torch.equal(score(step_aware.load(folder), 300.0), score(tiny_model, 300.0))


def test_loss_by_hand() -> None:
    margin, label = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1.0, 0.5, 0.25])
    loss, metrics = spm_loss(margin, label)
    first = math.log(1 + math.exp(-2))
    second = 0.5 * math.log(1 + math.exp(1)) + 0.5 * math.log(1 + math.exp(-1)) - math.log(2)
    third = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert float(loss) == pytest.approx((first + second + third) / 3, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    tie = torch.zeros(1, requires_grad=True)
    loss, _ = spm_loss(tie, torch.tensor([0.5]))
    assert loss.detach().abs() < 1e-6 and not torch.autograd.grad(loss, tie)[0].any()


def test_estimates_are_one_step_of_the_base_from_the_same_noise(family: str, tiny_spm: Make) -> None:
    trainer = tiny_spm(family, cfg=2.0)
    batch, noise = trainer.batches.batch(0), torch.randn(4, *trainer.policy.latent_shape())
    rows = torch.tensor([3, 200, 500, 900])
    found = trainer.estimates(batch, rows, noise)
    alpha, sigma, t = (table[rows] for table in (trainer.process.alpha, trainer.process.sigma, trainer.process.time))
    policy = trainer.policy
    cond, negative = policy.encode(batch.captions), policy.encode([""] * 4)
    for images_B3HW, half in zip((batch.winners_B3HW, batch.losers_B3HW), found.chunk(2), strict=True):
        latents = policy.encode_images(images_B3HW)
        x_t = alpha.view(4, 1, 1, 1) * latents + sigma.view(4, 1, 1, 1) * noise
        with torch.no_grad():
            outs = [policy.reference(x_t, t, c) for c in (negative, cond)]
        x0 = process.clean(trainer.process, rows, x_t, outs[0] + 2.0 * (outs[1] - outs[0]))
        assert torch.allclose(policy.decode(x0), half, atol=1e-3)


def test_training_measures_and_saves(tiny_spm: Make, tmp_path: Path) -> None:
    trainer = tiny_spm(max_steps=12, save_steps=6)
    blind = trainer.scorers[1].model
    trainer.train()
    folder = tmp_path / "spm"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [{name: row[name] for name in row if name.endswith("/zero_gradient")} for row in rows]
    assert shares[0].keys() == {"step_aware/zero_gradient", "time_blind/zero_gradient"} and not any(shares[1:])
    assert max(shares[0].values()) < 0.05
    assert len(rows) == 12 and all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1][f"{BLIND}/loss"] < 0.5 * rows[0][f"{BLIND}/loss"]
    assert not any(blind.model.vision_model.adaLN_modulation[1].weight.flatten())
    aware = step_aware.load(folder / "checkpoint-12" / AWARE)
    assert any(aware.model.vision_model.adaLN_modulation[1].weight.flatten())
    report = json.loads((folder / REPORT).read_text())
    assert report["pairs"] == 8 and [row["t"][0] for row in report["bins"]] == [1.0, 501.0]
    assert report["clean"][BLIND]["mean"] == 1.0  # bright images win
    for row in (*report["bins"], report["high_noise"], report["clean"]):
        assert row["difference"]["mean"] == pytest.approx(row[AWARE]["mean"] - row[BLIND]["mean"])
    assert (folder / FIGURE).stat().st_size > 1000


@pytest.mark.numerics
def test_resuming_equals_an_uninterrupted_run(tiny_spm: Make) -> None:
    options = {"max_steps": 4, "accumulation_steps": 2, "batch_size": 2}
    whole = tiny_spm(**options)
    stream = whole.batches.iterate(0, 8)
    for _ in range(4):
        if whole.step == 2:
            whole.save()
        expected = whole.iteration(stream)
    again = tiny_spm(**options, resume=True)
    again.resume()
    rest = again.batches.iterate(4, 8)
    found = [again.iteration(rest) for _ in range(2)][-1]
    assert again.step == 4
    assert {k: v for k, v in found.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    for ours, theirs in zip(again.scorers, whole.scorers, strict=True):
        states = (ours.model.state_dict(), theirs.model.state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_spo_can_be_judged_by_it(tiny_online: Callable[..., Any], tiny_model: StepAwareModel) -> None:
    options = {"divert_start_step": 1, "num_candidates": 2, "threshold": 0.0}
    trainer = tiny_online("spo", **options)
    trainer.scorer = tiny_model
    row = trainer.iteration()
    assert row["pairs"] == 8 and abs(row["preference_mean"] - row["reward"]) > 0.01
    assert math.isfinite(row["loss"])


def test_a_tiny_clip_needs_the_tokenizer_of_one() -> None:
    _, tokenizer = t5()
    with pytest.raises(ValueError, match="needs a CLIP tokenizer, and the base model has a T5Tokenizer"):
        step_aware.tiny_config(tokenizer)
