"""Rewards that are models, on tiny random checkpoints in the published layout: formulas, preprocessing, refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import BlipTextModel, BlipVisionModel, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewards import REWARDS, aesthetic, build, clip, hpsv2, imagereward, preprocessing, step_aware
from rewards import weights as weights_of
from rewards.weights import difference
from tests.conftest import check_contract
from tests.support import published, published_forward
from tests.support.published_forward import below

pytestmark = pytest.mark.usefixtures("tiny_architectures")
HPS, NAMES = published.HPS, published.REWARDS
PROMPTS = ["a red circle", "two blue crosses", "green squares and a red's", "red", "a " * 60 + "red circle"]
TOLERANCE = 1e-5  # matrix products round differently in batches of other sizes
PICTURES = (5, 3, 40, 61)


@pytest.fixture
def score(folders: dict[str, Path]) -> Callable[..., Tensor]:
    """Scores by the reward of a name, from its folder or another source."""

    def run(name: str, images: Tensor, prompts: list[str], source: str | Path | None = None) -> Tensor:
        mix = build([f"{name}={source or folders[name]}"])
        return mix(images, prompts, [{} for _ in prompts]).parts[name]

    return run


def pictures(shape: tuple[int, ...] = PICTURES) -> Tensor:
    """Smooth random images, so that what is cropped or padded matters."""
    coarse = torch.rand(shape[0], 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(coarse, shape[2:], mode="bilinear")


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def processed(images: Tensor) -> Tensor:
    """By transformers' own processor, in its PIL version."""
    sizes = {
        "size": {"shortest_edge": published.SIDE},
        "crop_size": {"height": published.SIDE, "width": published.SIDE},
    }
    rows = CLIPImageProcessorPil(**sizes)([as_pil(image) for image in images], return_tensors="pt")
    return rows["pixel_values"]


def normalised(square_3SS: Tensor) -> Tensor:
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (preprocessing.CLIP_MEAN, preprocessing.CLIP_STD))
    return (square_3SS - mean) / std


# The contract


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, folders: dict[str, Path]) -> None:
    reward = build([f"{name}={folders[name]}"]).rewards[name]
    check_contract(reward, pictures(), PROMPTS, [{} for _ in PROMPTS], TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_of_a_bounded_size(
    name: str, score: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(name, pictures(), PROMPTS)
    seen = []
    original = preprocessing.levels
    monkeypatch.setattr(preprocessing, "levels", lambda images: seen.append(len(images)) or original(images))
    monkeypatch.setattr(weights_of, "BATCH", 2)
    assert torch.allclose(score(name, pictures(), PROMPTS), whole, atol=TOLERANCE)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_and_the_image_count(name: str, score: Callable[..., Tensor]) -> None:
    images = pictures()
    scores = score(name, images, PROMPTS)
    assert ((scores - score(name, images.roll(1, 0), PROMPTS)).abs() > 1e-5).all()
    moved = (scores - score(name, images, [*PROMPTS[1:], PROMPTS[0]])).abs()
    assert (moved == 0).all() if name == "aesthetic" else (moved > 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_close_and_pickscore_stays_exact(
    name: str, score: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = score(name, pictures(), PROMPTS)
    for module in (clip, aesthetic, hpsv2, imagereward):
        monkeypatch.setattr(module, "half_on_gpu", lambda device: torch.float16)
    error = (score(name, pictures(), PROMPTS) - exact).abs().max()
    assert error == 0 if name == "pickscore" else 0 < error < 0.02 * exact.abs().max()


def test_half_precision_is_for_gpus() -> None:
    assert weights_of.half_on_gpu("cpu") is weights_of.half_on_gpu(torch.device("cpu")) is torch.float32
    assert weights_of.half_on_gpu("cuda") is weights_of.half_on_gpu(torch.device("cuda", 1)) is torch.float16


# Formulas, against transformers' own forward pass or the published one written out


def own_forward(folder: Path, images: Tensor, prompts: list[str]) -> tuple[CLIPModel, Tensor]:
    """transformers' model, and logits of each image with its own prompt."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    rows = tokenizer(prompts, padding=True, truncation=True, max_length=published.TINY.length, return_tensors="pt")
    with torch.no_grad():
        return model, model(**rows, pixel_values=processed(images)).logits_per_image.diag()


def test_pickscore_and_clipscore_are_what_transformers_computes(
    score: Callable[..., Tensor], folders: dict[str, Path]
) -> None:
    _, logits = own_forward(folders["pickscore"], pictures(), PROMPTS)
    assert logits.abs().min() > 0.1
    assert torch.allclose(score("pickscore", pictures(), PROMPTS), logits, atol=1e-4)
    model, logits = own_forward(folders["clipscore"], pictures(), PROMPTS)
    cosines = logits / model.logit_scale.exp()
    assert torch.allclose(score("clipscore", pictures(), PROMPTS), cosines, atol=1e-6)


@pytest.mark.parametrize(("name", "file"), HPS.items())
@pytest.mark.parametrize("shape", [(5, 3, 40, 61), (5, 3, 71, 40), (5, 3, 28, 28), (5, 3, 20, 20)])
def test_hpsv2_is_open_clip_on_padded_images(
    name: str, file: str, shape: tuple[int, ...], score: Callable[..., Tensor], folders: dict[str, Path]
) -> None:
    images = pictures(shape)
    prompts = ["a ‘r&amp;#101;d’s circle <", *PROMPTS[1:]]
    plain = ["a 'red's circle <", *PROMPTS[1:]]  # ftfy's quotes, then html, twice (ftfy leaves it to a "<")
    tokenizer = CLIPTokenizer.from_pretrained(folders[name])
    ids = tokenizer(plain, padding="max_length", truncation=True, max_length=published.TINY.length)["input_ids"]
    assert plain[0].count("'") == 2 and ids[0] != tokenizer(prompts[:1])["input_ids"][0]
    weights = torch.load(folders[name] / file, weights_only=True)["state_dict"]
    squares = torch.stack([padded_by_hand(as_pil(image)) for image in images])
    expected = published_forward.open_clip_cosine(weights, squares, torch.tensor(ids))
    assert expected.std() > 0.05
    assert torch.allclose(score(name, images, prompts), expected, atol=2e-6)


def test_imagereward_is_blip_a_head_and_standardisation(
    score: Callable[..., Tensor], folders: dict[str, Path]
) -> None:
    weights = torch.load(folders["imagereward"] / "ImageReward.pt", weights_only=True)
    word = published.BERT_WORDS.index
    rows = [[2, *map(word, text.split()), 3] for text in ("a red circle", "red circles of blue")]
    rows.append([2, *[word("a")] * 33, 3])  # cut at 35
    mask = torch.tensor([[True] * len(row) + [False] * (35 - len(row)) for row in rows])
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    squares = processed(pictures()[:3])
    patches = published_forward.blip_vision(below(weights, "blip.visual_encoder."), squares)
    state = published_forward.blip_text(below(weights, "blip.text_encoder."), ids, mask, patches)
    raw = published_forward.head(below(weights, "mlp."), state)
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 0.02
    found = score("imagereward", pictures()[:3], ["a red circle", "Red circles of BLUE", "a " * 60])
    assert torch.allclose(found, expected, atol=1e-5)


def test_aesthetic_is_a_linear_head_on_unit_features(score: Callable[..., Tensor], folders: dict[str, Path]) -> None:
    folder = folders["aesthetic"]
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = model.get_image_features(pixel_values=processed(pictures())).pooler_output
    head = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    expected = published_forward.head(head, features / features.norm(dim=1, keepdim=True))
    assert torch.allclose(score("aesthetic", pictures(), PROMPTS), expected, atol=1e-5)


# Preprocessing


def padded_by_hand(image: Image.Image) -> Tensor:
    """The longer side to 28, and as much black on both sides of the rest; one more on the far one."""
    width, height = image.size
    new = (28, round(width * 28 / height)) if height >= width else (round(height * 28 / width), 28)
    pixels_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    square = torch.zeros(3, 28, 28)
    top, left = (28 - new[0]) // 2, (28 - new[1]) // 2
    resized = functional.interpolate(pixels_3HW[None], new, mode="bicubic", antialias=True)[0]
    square[:, top : top + new[0], left : left + new[1]] = resized
    return normalised(square)


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (28, 28), (28, 90), (17, 23), (300, 301), (512, 512)])
def test_the_crop_is_that_of_the_clip_processor(size: tuple[int, int]) -> None:
    images = pictures((2, 3, *size))
    assert torch.allclose(preprocessing.centre_crop(images, published.SIDE), processed(images), atol=1e-6)


@pytest.mark.parametrize(("width", "floor", "even"), [(28, 0, 0), (29, 0, 0), (30, 1, 1), (31, 1, 2), (33, 2, 2)])
def test_the_crop_starts_where_transformers_or_torchvision_starts_it(width: int, floor: int, even: int) -> None:
    ramp = (torch.arange(width) / 255).expand(1, 3, 28, width)
    for half, start in ((preprocessing.floor_half, floor), (preprocessing.round_half, even)):
        crop = preprocessing.centre_crop(ramp, 28, half)
        red = crop[0, 0, 0] * preprocessing.CLIP_STD[0] + preprocessing.CLIP_MEAN[0]
        assert (red * 255).round().tolist() == list(range(start, start + 28))


def test_imagereward_crops_as_torchvision_does(score: Callable[..., Tensor]) -> None:
    images = pictures((2, 3, 28, 31))
    start = partial(score, "imagereward", prompts=PROMPTS[:2])
    assert torch.allclose(start(images), start(images[..., 2:30]), atol=TOLERANCE)
    assert not torch.allclose(start(images), start(images[..., 1:29]), atol=1e-4)


def test_hpsv2_pads_what_pickscore_crops(score: Callable[..., Tensor]) -> None:
    wide = pictures((3, 3, 28, 56))
    changed = wide.clone()
    changed[..., :10] = 0.5
    assert torch.equal(score("pickscore", wide, PROMPTS[:3]), score("pickscore", changed, PROMPTS[:3]))
    moved = score("hpsv2", wide, PROMPTS[:3]) - score("hpsv2", changed, PROMPTS[:3])
    assert (moved.abs() > 1e-3).all()
    bars = preprocessing.pad_to_square(wide, 28)
    black = -torch.tensor(preprocessing.CLIP_MEAN) / torch.tensor(preprocessing.CLIP_STD)
    assert torch.allclose(bars[:, :, [0, 6, 21, 27]], black.view(3, 1, 1).expand(3, 3, 4, 28))
    assert not torch.isclose(bars[:, :, 7:21], black.view(3, 1, 1)).all(dim=1).any()


def test_padded_images_are_resized_as_pil_does_before_it_rounds_and_clamps() -> None:
    noise = torch.rand(1, 3, 56, 112, generator=torch.Generator().manual_seed(0))
    resized = as_pil(noise[0]).resize((28, 14), Image.Resampling.BICUBIC)
    expected = normalised(torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255)
    assert torch.allclose(preprocessing.pad_to_square(noise, 28)[0, :, 7:21], expected, atol=1.1 / 255 / 0.26)
    edge = torch.zeros(1, 3, 14, 14)
    edge[..., 7:] = 1
    over = preprocessing.pad_to_square(edge, 28)[0, 0] * preprocessing.CLIP_STD[0] + preprocessing.CLIP_MEAN[0]
    assert over.max() > 1.02 and over.min() < -0.02


def test_pixels_are_rounded_to_the_nearest_level() -> None:
    flat = torch.full((1, 3, 28, 28), 128 / 255)
    assert torch.equal(preprocessing.centre_crop(flat - 0.4 / 255, 28), preprocessing.centre_crop(flat, 28))
    assert preprocessing.centre_crop(flat, 28)[0, 0, 0, 0] == pytest.approx((128 / 255 - 0.48145466) / 0.26862954)


# Full-size layouts


def on_meta(shapes: published.Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_hpsv2_has_the_layout_of_open_clips_vit_h_14() -> None:
    found = on_meta(published.open_clip_shapes(published.VIT_H, 1024))
    assert sum(tensor.numel() for tensor in found.values()) == 986_109_441  # as open_clip's docs/model_profile.csv
    with torch.device("meta"):
        expected = CLIPModel(step_aware.clip_h_config()).state_dict()
    assert difference(expected, hpsv2.from_open_clip(found)) == ""


def test_imagereward_has_the_layout_of_the_published_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    published_tensors = on_meta(published.imagereward_shapes(published.BLIP_L))
    megabytes = sum(4 * tensor.numel() for tensor in published_tensors.values()) / 1e6
    assert round(megabytes, -1) == 1790  # the hub lists ImageReward.pt with 1.79 GB
    vision, text, head = imagereward.towers(published_tensors)
    vision_config, text_config = imagereward.configs()
    with torch.device("meta"):
        assert difference(BlipVisionModel(vision_config).state_dict(), vision) == ""
        assert difference(BlipTextModel(text_config, add_pooling_layer=False).state_dict(), text) == ""
        assert difference(aesthetic.LinearHead(768).state_dict(), head) == ""
    assert (vision_config.layer_norm_eps, text_config.layer_norm_eps) == (1e-6, 1e-12)
    assert vision_config.hidden_act == text_config.hidden_act == "gelu"


# Sources


@pytest.mark.parametrize("name", [*HPS, "imagereward", "aesthetic"])
def test_a_source_may_be_the_file_itself(
    name: str, score: Callable[..., Tensor], folders: dict[str, Path], tmp_path: Path
) -> None:
    file = next(file for file in folders[name].iterdir() if file.suffix in (".pt", ".pth"))
    assert torch.equal(score(name, pictures(), PROMPTS, file), score(name, pictures(), PROMPTS))
    weights = torch.load(file, weights_only=True)
    for place in folders[name].iterdir():
        if place != file:
            (tmp_path / place.name).symlink_to(place)
    save_file(weights.get("state_dict", weights), tmp_path / f"{file.stem}.safetensors")
    assert torch.equal(score(name, pictures(), PROMPTS, tmp_path), score(name, pictures(), PROMPTS))


def test_what_a_source_lacks_is_taken_from_the_hub(
    score: Callable[..., Tensor], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = tmp_path / "head.pth"
    head.write_bytes((folders["aesthetic"] / "sac+logos+ava1-l14-linearMSE.pth").read_bytes())
    monkeypatch.setattr(aesthetic, "CLIP_L", str(folders["aesthetic"]))
    assert torch.equal(score("aesthetic", pictures(), PROMPTS, head), score("aesthetic", pictures(), PROMPTS))
    weights = tmp_path / "weights.pt"
    weights.write_bytes((folders["hpsv2"] / HPS["hpsv2"]).read_bytes())
    monkeypatch.setattr(hpsv2, "CLIP_H", str(folders["hpsv2"]))
    assert torch.equal(score("hpsv2", pictures(), PROMPTS, weights), score("hpsv2", pictures(), PROMPTS))


def test_the_default_is_the_published_one(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(folders[name] / file)

    monkeypatch.setattr(weights_of, "hf_hub_download", download)
    for name in (*HPS, "imagereward", "aesthetic"):
        with pytest.raises(ValueError, match=r"has no (tokenizer|CLIP) of|cannot read"):
            build([name])
    assert asked == [
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("xswu/HPSv2", "HPS_v2_compressed.pt"),
        ("THUDM/ImageReward", "ImageReward.pt"),
        ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
    ]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pickscore", "no CLIP of 'yuvalkirstain/PickScore_v1' here: `hf download yuvalkirstain/PickScore_v1`"),
        ("clipscore", "`hf download openai/clip-vit-large-patch14`"),
        ("hpsv2", "`hf download xswu/HPSv2 HPS_v2.1_compressed.pt`"),
        ("hpsv2_v2.0", "`hf download xswu/HPSv2 HPS_v2_compressed.pt`"),
        ("imagereward", "`hf download THUDM/ImageReward ImageReward.pt`"),
        ("aesthetic", "`hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth`"),
    ],
)
@pytest.mark.parametrize("source", ["", "=no/such"])
def test_what_is_not_here_is_said_in_one_line_with_the_cure(name: str, what: str, source: str) -> None:
    with pytest.raises(ValueError) as caught:
        build([name + source])
    message = str(caught.value)
    assert message.startswith(f"reward {name!r} has no ") and "\n" not in message and len(message) < 500
    assert f"or give a local copy, {name}=PATH" in message
    assert ("'no/such' here: `hf download no/such" if source else what) in message


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_a_missing_tokenizer_is_not_an_empty_one(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders[name].iterdir():
        if file.name not in weights_of.VOCABULARIES:
            (tmp_path / file.name).symlink_to(file)
    hub = "google-bert/bert-base-uncased" if name == "imagereward" else step_aware.CLIP_H
    with pytest.raises(
        ValueError, match=f"reward '{name}' has no tokenizer of '{hub}' here: `hf download {hub} .*vocab"
    ):
        build([f"{name}={tmp_path}"])


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize("name", [*HPS, "imagereward", "aesthetic"])
def test_a_file_that_is_something_else_is_refused(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(aesthetic, "CLIP_L", str(folders["aesthetic"]))
    file = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match=f"reward '{name}': the folder {tmp_path} holds no .*(pt|pth) or "):
        build([f"{name}={tmp_path}"])
    refused = pytest.raises(ValueError, match=f"^reward '{name}' cannot read {file}: .*")
    file.write_bytes(b"<html>")
    with refused:
        build([f"{name}={file}"])
    file.write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=2))
    with refused:
        build([f"{name}={file}"])
    torch.save({"state_dict": Malicious()}, file)
    with refused:
        build([f"{name}={file}"])
    assert not (tmp_path / "unpickled").exists()
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=f"cannot read {file}: it lacks"):
        build([f"{name}={file}"])


def test_a_clip_folder_must_hold_all_of_a_clip_in_safetensors(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(folders["pickscore"] / name)
    torch.save(published.write_clip(tmp_path / "other").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"^reward 'pickscore' cannot read the CLIP in {tmp_path}: "):
        build([f"pickscore={tmp_path}"])
    state = published.write_clip(tmp_path / "other").state_dict()
    del state["logit_scale"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is no CLIP, it lacks logit_scale"):
        build([f"pickscore={tmp_path}"])


def test_every_model_reward_says_what_a_source_may_be() -> None:
    models = {name for name, spec in REWARDS.items() if spec.needs == "download"}
    assert models == {*NAMES, "geneval", "geneval_strict"}  # the last two: test_geneval.py
    assert all(REWARDS[name].source for name in models)
