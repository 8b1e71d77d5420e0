"""Pretraining of both worlds: losses by hand, what is learnt from, and the commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rlg.models.backbones import backbone_of
from rlg.models.policy import Policy
from rlg.pretraining import __main__ as command
from rlg.pretraining import autoencoder, denoiser, show
from rlg.pretraining.settings import DEFAULTS, PretrainingSettings, ShowSettings
from rlg.prompts import Prompt
from rlg.tinyworld import networks
from rlg.tinyworld.worlds import EMOJI, SHAPES, World

WORLDS = pytest.mark.parametrize("world", [SHAPES, EMOJI], ids=lambda world: world.name)


class Blank:
    """An autoencoder that encodes everything as N(mean, 1) and decodes everything as mid grey."""

    def __init__(self, mean: float):
        self.mean = mean

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        mean = torch.full((len(pixels), 1, 1, 1), self.mean)
        one = torch.ones_like(mean)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=one, var=one, logvar=0 * one))

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.zeros(len(z), 3, 2, 2))


def test_loss_of_the_autoencoder_by_hand() -> None:
    """A white pixel is 1 off: L1 + 4 L2 = 5; one of lightness 3/4 is 1/2 off: 3/2. The KL of N(2, 1) is 2."""
    image, generator = torch.ones(1, 3, 2, 2), torch.Generator()
    image[:, :, 0, 0] = 0.75
    even, uneven = torch.ones(1, 1, 2, 2), torch.tensor([[[[2.5, 0.5], [0.5, 0.5]]]])
    assert autoencoder.vae_loss(Blank(0.0), image, even, generator) == pytest.approx((1.5 + 3 * 5) / 4)
    assert autoencoder.vae_loss(Blank(0.0), image, uneven, generator) == pytest.approx((2.5 * 1.5 + 0.5 * 15) / 4)
    assert autoencoder.vae_loss(Blank(2.0), image, even, generator) == pytest.approx((1.5 + 3 * 5) / 4 + 2e-3)


def test_the_decoder_goes_on_alone(tmp_path: Path) -> None:
    """The first part trains all of it, the second leaves the latents as they are."""
    torch.manual_seed(0)
    vae = networks.build_vae(16, networks.SIZES["emoji"].vae_widths, shifted=True)
    budget = replace(DEFAULTS["emoji", "sd3"], vae_batch=2, vae_steps=1, decoder_steps=1)
    changed = []
    for part in autoencoder.parts(vae, budget):
        before = {name: value.clone() for name, value in vae.state_dict().items()}
        autoencoder.train(vae, part, EMOJI, tmp_path / part.name, budget, settings_of(EMOJI))
        changed.append({k.partition(".")[0] for k, value in vae.state_dict().items() if not value.equal(before[k])})
        assert not any(parameter.requires_grad for parameter in vae.parameters())
        assert all(parameter.grad is None for parameter in vae.encoder.parameters())
    assert changed == [{"encoder", "decoder"}, {"decoder"}]


def settings_of(world: World, family: str = "sd3", **told: object) -> PretrainingSettings:
    return PretrainingSettings(world=world.name, family=family, output=Path("unused"), **told)


@WORLDS
def test_the_autoencoder_learns(world: World) -> None:
    torch.manual_seed(0)
    vae = networks.build_vae(16, networks.SIZES[world.name].vae_widths, shifted=True)
    images = autoencoder.crowded_scenes(world, 2, torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(vae.parameters(), lr=2e-3), []
    for _ in range(6):
        loss = autoencoder.vae_loss(vae, images, world.weights(images), torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_crowded_scenes_are_the_fuller_half() -> None:
    drawn: list[Prompt] = []
    world = replace(EMOJI, draw=lambda prompts, generator: drawn.extend(prompts) or torch.zeros(len(prompts)))
    assert len(autoencoder.crowded_scenes(world, 32, torch.Generator().manual_seed(0))) == 32
    counts = [sum(clause["count"] for clause in p.metadata["include"]) for p in drawn]
    asked = EMOJI.training_prompts(64, torch.Generator().manual_seed(0))
    every = [sum(clause["count"] for clause in p.metadata["include"]) for p in asked]
    assert counts == sorted(every, reverse=True)[:32]


@WORLDS
def test_latents_have_variance_one_and_no_held_out_caption(world: World) -> None:
    torch.manual_seed(0)
    vae = networks.build_vae(16, networks.SIZES[world.name].vae_widths, shifted=True).eval()
    made = autoencoder.encode_scenes(vae, world, 40, settings_of(world))
    assert not {p.text for p in world.composition_prompts("test")} & set(made.captions)
    latents = made.normalised(vae)
    assert latents.shape == (40, 16, 8, 8)
    assert latents.mean() == pytest.approx(0, abs=1e-5)
    assert latents.std() == pytest.approx(1, abs=1e-5)
    back = latents / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(back, made.latents_NCHW)
    plain = networks.build_vae(16, networks.SIZES[world.name].vae_widths, shifted=False)
    torch.testing.assert_close(made.normalised(plain) / plain.config.scaling_factor, made.latents_NCHW)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_denoiser_learns_a_scene(family: str) -> None:
    """One batch again and again."""
    torch.manual_seed(0)
    pipe = networks.build(family, EMOJI)
    pipe.set_progress_bar_config(disable=True)
    backbone_of(pipe).prepare(pipe)
    budget = replace(DEFAULTS["emoji", family], batch=4, dropout=0.5)
    objective = denoiser.Objective(pipe, torch.randn(2, 16, 8, 8), ["a fox", "two owls"], budget)
    modules = [objective.network, *(getattr(pipe, name) for name in objective.backbone.text_encoders)]
    (optimizer,) = denoiser.optimizers_of(modules, muon=False)
    losses = []
    for _ in range(12):
        loss = objective.loss(torch.Generator().manual_seed(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.8  # of a network that knows nothing, by the eps or velocity of unit noise
    assert losses[-1] < 0.8 * losses[0]


def test_muon_has_the_matrices_of_a_transformers_blocks() -> None:
    pipe = networks.build("sd3")
    for muon in (True, False):
        matrices, rest = denoiser.split_parameters([pipe.transformer, pipe.text_encoder], muon)
        everything = [*pipe.transformer.parameters(), *pipe.text_encoder.parameters()]
        assert len(matrices) + len(rest) == len(everything)
        assert all(p.ndim == 2 for p in matrices)
        assert bool(matrices) == muon
    assert not denoiser.split_parameters([networks.build("sd").unet], True)[0]


class Looks:
    """Looks at a training, made cheap: of 12 samples in one step."""

    def __init__(self, patch: pytest.MonkeyPatch):
        patch.setattr(denoiser, "_SHOWN", 12)
        patch.setattr(denoiser, "_LOOK", replace(denoiser._LOOK, steps=1))


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_command_makes_a_pipeline_and_goes_on(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Looks(monkeypatch)
    output, state = tmp_path / "model", tmp_path / "model-state"
    options = (
        f"--world emoji --family {family} --vae_steps 1 --decoder_steps 1 --scenes 12 --batch_size 2 --look_every 2"
    )
    for steps in (1, 2):
        monkeypatch.setattr("sys.argv", ["x", *options.split(), "--max_steps", str(steps), "--output", str(output)])
        command.main()
    assert f"saved {output}" in capsys.readouterr().out
    assert [file.name for file in (state / f"samples-{family}").iterdir()] == ["000002.png"]
    pipe = DiffusionPipeline.from_pretrained(output)
    assert pipe("two foxes", num_inference_steps=1).images[0].size == (64, 64)
    assert sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) <= 24e6
    policy = Policy.load(str(output))
    assert policy.pipe.tokenizer.get_vocab() == networks.build_tokenizer(EMOJI).get_vocab()


def test_a_report_by_hand() -> None:
    """Two prompts of two images: 3 of 4 in all, 1 of 2 and 2 of 2 by tag."""
    prompts = [Prompt("a fox", {"tag": "single_object"})] * 2 + [Prompt("two owls", {"tag": "counting"})] * 2
    text = show.report(ShowSettings(base="m", cfg=3.0), prompts, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    lines = text.splitlines()
    assert lines[0] == "m, CFG 3, 20 ODE steps, seed 0, 4 images of 2 prompts"
    assert lines[1].startswith("composition (strict): 75.0% ")
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "single_object 50.0% (2 images)",
        "counting 100.0% (2 images)",
    ]


@WORLDS
def test_a_model_is_shown_by_its_own_world(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model shows nothing of what it is told; signs are a row of the shapes' grid alone."""
    torch.manual_seed(0)
    networks.save(networks.build("sd", world), tmp_path / "random")
    few = replace(world, composition_prompts=lambda split: world.composition_prompts(split)[:60])
    monkeypatch.setattr("rlg.tinyworld.worlds._WORLDS", {world.name: few})
    grid = tmp_path / "grid.png"
    show.main(["--base", str(tmp_path / "random"), "--steps", "1", "--k", "1", "--output", str(grid)])
    out = capsys.readouterr().out
    assert "1 ODE steps, seed 0, 60 images of 60 prompts" in out
    assert "composition (strict): 0.0%" in out
    assert grid.is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--family sd3 --world smileys --output x", "unknown world 'smileys'; known: shapes, emoji"),
        ("--family flux --output x", "unknown family 'flux'; known: sd3, sd"),
        ("--family sd --output x --dtype float16", "unknown dtype 'float16'; known: float32, bfloat16"),
        ("--family sd --output x --max_steps 0", "max_steps must be positive, got 0"),
        ("--family sd", "the following arguments are required: --output; see --help"),
    ],
)
def test_mistakes_are_one_line(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"
