"""Our scores against those of the published packages hpsv2 1.2.0 and image-reward 1.5, with the same random weights.

`make test-parity` makes the environment that they run in; where they are absent, this module is skipped. The packages
are used as they are, but for what no longer works: modules that they import without need are replaced by empty ones,
and names that transformers 5 has dropped are put back. Networks are narrow and shallow, images and vocabulary are not.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import BertConfig, BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, modeling_utils

from rewards import aesthetic, build, hpsv2, imagereward
from tests.support import published
from tests.support.published import Sizes

if importlib.util.find_spec("hpsv2") is None:
    pytest.skip("without the published packages; make test-parity installs them", allow_module_level=True)

TOLERANCE = 1e-4
SIDE = 224
NARROW_CLIP = Sizes(64, 2, 64, 2, 49408, 77, (SIDE // 14) ** 2)
NARROW_BLIP = Sizes(64, 2, 768, 2, len(published.BERT_WORDS), 512, (SIDE // 16) ** 2, patch=16)
HEADS = 2
PROMPTS = [
    "A red circle, and two blue crosses",
    "an  astronaut’s portrait &amp; “a dog’s”; ﬁlm grain\n  8k",
    "three green squares, " * 30,
    "naïve café, 日本, 12345 ½",
]
SHAPES = [(512, 512), (300, 227), (229, 400), (100, 150)]


def stub(name: str, **content: Any) -> None:
    """A module with this content and nothing else, in place of one that is not there or does not work."""
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Of several shapes, smooth, with some noise."""
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int) -> Image.Image:
        smooth = interpolate(torch.rand(1, 3, 7, 7, generator=generator), (height, width), mode="bilinear")[0]
        levels = (smooth + 0.1 * torch.randn(3, height, width, generator=generator)).clamp(0, 1) * 255
        return Image.fromarray(levels.round().byte().permute(1, 2, 0).numpy())

    return [image(*shape) for shape in SHAPES]


def ours(name: str, folder: Path, images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Scores of images that may differ in shape."""
    mix = build([f"{name}={folder}"])
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in images]
    return torch.cat([mix(x, [prompt], [{}]).total_B for x, prompt in zip(tensors, prompts, strict=True)])


def shapes_of(module: torch.nn.Module) -> published.Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights at which all inputs count."""
    module.load_state_dict(published.random_tensors(shapes_of(module)))
    return module.eval()


# hpsv2


@pytest.fixture(scope="module")
def hps() -> SimpleNamespace:
    """The package's modules."""
    stub("turtle", forward=None)  # open_clip/factory.py imports it by mistake
    stub("clint")
    stub("clint.textui", progress=None)  # an old progress bar
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory, model, tokenizer, transform

    return SimpleNamespace(img_score=img_score, factory=factory, model=model, tokenizer=tokenizer, transform=transform)


def clip_config(towers: dict[str, Any]) -> CLIPConfig:
    """The package's configuration of a CLIP as transformers'."""
    vision, text, embedding = towers["vision_cfg"], towers["text_cfg"], towers["embed_dim"]

    def tower(row: dict[str, Any], heads: int) -> dict[str, Any]:
        width = row["width"]
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": row["layers"]}
        return sizes | {"num_attention_heads": heads, "hidden_act": "gelu", "projection_dim": embedding}

    return CLIPConfig(
        text_config=tower(text, text["heads"]),
        vision_config=tower(vision, vision["width"] // vision["head_width"]) | {"patch_size": vision["patch_size"]},
        projection_dim=embedding,
    )


def write_clip_tokenizer(folder: Path, encoder: dict[str, int], ranks: dict[tuple[str, str], int]) -> None:
    """The package's own vocabulary in the hub's format."""
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({special.get(token, token): i for token, i in encoder.items()}))
    merges = [" ".join(pair) for pair, _ in sorted(ranks.items(), key=lambda row: row[1])]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


@pytest.mark.parametrize(
    ("name", "file"), [("hpsv2", "HPS_v2.1_compressed.pt"), ("hpsv2_v2.0", "HPS_v2_compressed.pt")]
)
def test_hpsv2(
    name: str,
    file: str,
    hps: SimpleNamespace,
    images: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    towers = hps.factory.get_model_config("ViT-H-14")
    towers["embed_dim"] = published.EMBEDDING
    towers["vision_cfg"] |= {"layers": 2, "width": NARROW_CLIP.width, "head_width": NARROW_CLIP.width // HEADS}
    towers["text_cfg"] |= {"layers": 2, "width": NARROW_CLIP.text_width, "heads": HEADS}
    model = fill(hps.model.CLIP(**towers, output_dict=True))
    assert shapes_of(model) == published.open_clip_shapes(NARROW_CLIP, published.EMBEDDING)
    torch.save({"state_dict": model.state_dict()}, tmp_path / file)
    write_clip_tokenizer(tmp_path, hps.tokenizer._tokenizer.encoder, hps.tokenizer._tokenizer.bpe_ranks)
    preprocess = hps.transform.image_transform(model.visual.image_size, is_train=False, resize_longest_max=True)
    monkeypatch.setattr(hps.img_score, "model_dict", {"model": model, "preprocess_val": preprocess})
    monkeypatch.setattr(hps.img_score, "device", "cpu")
    pairs = zip(images, PROMPTS, strict=True)
    theirs = [hps.img_score.score(image, prompt, cp=str(tmp_path / file))[0] for image, prompt in pairs]
    monkeypatch.setattr(hpsv2, "clip_h_config", partial(clip_config, towers))
    assert np.std(theirs) > 0.01
    assert ours(name, tmp_path, images, PROMPTS).tolist() == pytest.approx([float(x) for x in theirs], abs=TOLERANCE)


def test_the_layout_of_vit_h_14_is_hpsv2s(hps: SimpleNamespace) -> None:
    with torch.device("meta"):
        model = hps.model.CLIP(**hps.factory.get_model_config("ViT-H-14"))
    assert shapes_of(model) == published.open_clip_shapes(published.VIT_H, 1024)


# image-reward


def restore_what_transformers_dropped() -> Iterator[tuple[object, str, Any]]:
    """(where, name, value) that ImageReward/models/BLIP/med.py relies on, with the meaning of transformers 4."""
    yield modeling_utils, "apply_chunking_to_forward", transformers.apply_chunking_to_forward
    for unused in ("find_pruneable_heads_and_indices", "prune_linear_layer"):
        yield modeling_utils, unused, None
    model = modeling_utils.PreTrainedModel
    yield model, "init_weights", lambda self: None  # the test fills them in
    yield model, "get_head_mask", lambda self, mask, layers: [None] * layers
    yield model, "invert_attention_mask", lambda self, mask: (1 - mask[:, None, None].float()) * -1e9


@pytest.fixture(scope="module")
def blip() -> Iterator[SimpleNamespace]:
    """The package's modules, without its __init__, which imports a trainer and packages that are not on PyPI."""
    found = importlib.util.find_spec("ImageReward")
    assert found is not None and found.submodule_search_locations is not None
    root = Path(next(iter(found.submodule_search_locations)))
    stub("ImageReward", __path__=[str(root)])
    stub("ImageReward.models", __path__=[str(root / "models")])
    stub("clip")
    stub("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)  # for training
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        stub(name, __path__=[])
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in restore_what_transformers_dropped():
            patch.setattr(where, name, value, raising=False)
        from ImageReward import ImageReward as scorer
        from ImageReward.models import AestheticScore
        from ImageReward.models.BLIP import blip_pretrain, med, vit

        yield SimpleNamespace(
            scorer=scorer, AestheticScore=AestheticScore, blip_pretrain=blip_pretrain, med=med, vit=vit
        )


def med_config(sizes: Sizes, heads: int) -> dict[str, Any]:
    """med_config.json of the hub, in other sizes."""
    return {
        "hidden_act": "gelu",
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": sizes.length,
        "num_attention_heads": heads,
        "num_hidden_layers": sizes.text_layers,
        "vocab_size": sizes.vocabulary,
        "encoder_width": sizes.width,
        "add_cross_attention": True,
    }


def blip_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """`imagereward.configs` in the sizes of `NARROW_BLIP`."""
    vision, text = imagereward.configs()
    narrow = {"num_hidden_layers": 2, "num_attention_heads": HEADS}
    vision.update(narrow | {"hidden_size": NARROW_BLIP.width, "intermediate_size": 4 * NARROW_BLIP.width})
    text.update(narrow | {"encoder_hidden_size": NARROW_BLIP.width, "vocab_size": NARROW_BLIP.vocabulary})
    return vision, text


def test_imagereward(
    blip: SimpleNamespace, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.write_bert_tokenizer(tmp_path)
    (tmp_path / "med_config.json").write_text(json.dumps(med_config(NARROW_BLIP, HEADS)))
    narrow = {"patch_size": NARROW_BLIP.patch, "embed_dim": NARROW_BLIP.width, "depth": 2, "num_heads": HEADS}

    def create_vit(vit: str, side: int, *rest: object) -> tuple[torch.nn.Module, int]:
        return blip.vit.VisionTransformer(img_size=side, **narrow), NARROW_BLIP.width

    monkeypatch.setattr(blip.blip_pretrain, "create_vit", create_vit)
    monkeypatch.setattr(blip.blip_pretrain, "init_tokenizer", lambda: BertTokenizer.from_pretrained(tmp_path))
    model = fill(blip.scorer.ImageReward(str(tmp_path / "med_config.json")))
    assert shapes_of(model) == published.imagereward_shapes(NARROW_BLIP)
    torch.save(model.state_dict(), tmp_path / "ImageReward.pt")
    prompts = ["A red circle", "two blue crosses, and a green square's", "red circles of blue " * 20, "日本 red"]
    with torch.no_grad():
        theirs = [model.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    monkeypatch.setattr(imagereward, "configs", partial(lambda value: value, blip_configs()))
    assert np.std(theirs) > 0.01
    assert ours("imagereward", tmp_path, images, prompts).tolist() == pytest.approx(theirs, abs=TOLERANCE)


def test_the_layout_of_imagereward_is_the_packages(blip: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, linspace = published.BLIP_L, torch.linspace
    config = BertConfig(**med_config(sizes, 12))
    monkeypatch.setattr(torch, "linspace", partial(linspace, device="cpu"))  # its values are read
    with torch.device("meta"):
        vision = blip.vit.VisionTransformer(224, 16, embed_dim=1024, depth=24, num_heads=16)
        text = blip.med.BertModel(config, add_pooling_layer=False)
    found = {f"blip.visual_encoder.{name}": shape for name, shape in shapes_of(vision).items()}
    found |= {f"blip.text_encoder.{name}": shape for name, shape in shapes_of(text).items()}
    towers = ("blip.visual_encoder.", "blip.text_encoder.")
    expected = published.imagereward_shapes(sizes)
    assert found == {name: shape for name, shape in expected.items() if name.startswith(towers)}


@pytest.mark.parametrize("package", ["scorer", "AestheticScore"])
def test_the_head(package: str, blip: SimpleNamespace) -> None:
    """The package's reward and its aesthetic predictor have the same one."""
    make: Callable[[int], torch.nn.Module] = getattr(blip, package).MLP
    theirs = fill(make(768))
    mine = aesthetic.LinearHead(768).fill(theirs.state_dict())
    features = torch.nn.functional.normalize(torch.randn(5, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.allclose(theirs(features)[:, 0], mine(features), atol=1e-5)
