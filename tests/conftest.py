"""The environment of all tests (no network, no tracker's server, a sane number of threads), and tiny policies."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

# Before torch and the hub's libraries are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose time on more, and workers share the cores

import datasets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from rewards import REWARDS, Reward, RewardMix
from rlg.models.backbones import backbone_of
from rlg.models.policy import Policy
from rlg.prompts import Prompt
from rlg.tinyworld import networks
from tests.support import perturbed_kernels
from tests.support.golden import RTOL, Golden
from tests.support.smooth_rewards import SMOOTH, build_brightness
from tests.support.tiny_families import FAMILIES
from trainers.adjoint_matching import AdjointMatchingConfig, AdjointMatchingTrainer
from trainers.core.online import OnlineTrainer
from trainers.dpo import DPOConfig, OnlineDPOTrainer
from trainers.draft import DRaFTConfig, DRaFTTrainer
from trainers.grpo import GRPOConfig, GRPOTrainer
from trainers.nft import NFTConfig, NFTTrainer
from trainers.rwr import RWRConfig, RWRTrainer
from trainers.spo import SPOConfig, SPOTrainer
from trainers.vgg_flow import VGGFlowConfig, VGGFlowTrainer

BRIGHTNESS = build_brightness("cpu", None)
ONLINE = {
    "adjoint_matching": (AdjointMatchingConfig, AdjointMatchingTrainer),
    "draft": (DRaFTConfig, DRaFTTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
    "nft": (NFTConfig, NFTTrainer),
    "online_dpo": (partial(DPOConfig, online=True), OnlineDPOTrainer),
    "rwr": (RWRConfig, RWRTrainer),
    "spo": (SPOConfig, SPOTrainer),
    "vgg_flow": (VGGFlowConfig, VGGFlowTrainer),
}
pytest_plugins = ["tests.support.guided_pipelines"]
PROMPTS = [Prompt(text) for text in ("a red circle", "two blue crosses", "three green squares")]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/*/test_golden*.py --record-golden` writes tests/golden/ anew; see CONTRIBUTING.md, Numerics."""
    parser.addoption("--record-golden", action="store_true", help="record the golden files instead of comparing")
    parser.addoption("--golden-rtol", type=float, default=RTOL, help="1e-5 where they were recorded")
    parser.addoption("--kernels", choices=perturbed_kernels.DOUBLES, help="a double of torch's products on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    """Install the double of `--kernels` in the tests' own process; see docs/reproducibility.md."""
    if config.option.kernels:
        double = perturbed_kernels.install(config.option.kernels)
        config.add_cleanup(double._destroy)


@pytest.fixture
def golden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Golden]:
    """The recorded files, on one thread (sums in one order), with rewards that are smooth in the pixels.

    Figures stay blank, and the packages that are installed are listed once: both take longer than what is recorded.
    """
    for name, spec in SMOOTH.items():
        monkeypatch.setitem(REWARDS, name, spec)
    monkeypatch.setattr(Figure, "savefig", lambda _, file, **__: Path(file).write_text("<svg></svg>"))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", cache(packages_distributions))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Golden(request.config.option.record_golden, request.config.option.golden_rtol)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a randomly initialised pipeline of a family, in the format that users have, made once."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(family: str) -> Path:
        target = root / family
        if not target.exists():
            torch.manual_seed(0)
            pipe = FAMILIES[family].build()
            for parameter in backbone_of(pipe).denoiser(pipe).parameters():
                if not parameter.any():  # zero-initialised layers would make every output 0
                    torch.nn.init.normal_(parameter, std=0.02)
            networks.save(pipe, target)
        return target

    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each model family in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_policy(tiny_folder: Callable[[str], Path]) -> Callable[..., Policy]:
    """A random policy of a family, with a LoRA that is not zero unless `fresh` says so."""

    def make(family: str, fresh: bool = False) -> Policy:
        policy = Policy.load(str(tiny_folder(family)))
        torch.manual_seed(1)
        for parameter in policy.add_lora(rank=4, alpha=8):
            if not fresh:
                torch.nn.init.normal_(parameter, std=0.05)
        return policy

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder with the adapter of `tiny_policy(family)` in both formats, made once; tests must not write to it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            tiny_policy(family).save_adapter(root / family)
        return root / family

    return folder


def check_contract(
    reward: Reward, images_B3HW: Tensor, prompts: list[str], metadata: list[dict], tolerance: float = 0.0
) -> Tensor:
    """The scores, after asserting that they are what `Reward` promises; each is the same in any batch."""

    def close(scores: Tensor, expected: Tensor) -> bool:
        return torch.allclose(scores, expected, rtol=tolerance, atol=tolerance)

    before = images_B3HW.clone()
    scores = reward(images_B3HW, prompts, metadata)
    assert scores.shape == (len(prompts),)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu" and not scores.requires_grad
    assert scores.isfinite().all()
    assert torch.equal(images_B3HW, before), "a reward must not write into the images"
    assert scores.unique().numel() > 1, "the batch does not exercise this reward"
    alone = [reward(images_B3HW[i : i + 1], prompts[i : i + 1], metadata[i : i + 1]) for i in range(len(prompts))]
    assert close(torch.cat(alone), scores)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = reward(images_B3HW[order], [prompts[i] for i in order], [metadata[i] for i in order])
    assert close(shuffled, scores[order])
    assert reward(images_B3HW[:0], [], []).shape == (0,)
    assert torch.equal(reward(images_B3HW.clone().requires_grad_(), prompts, metadata), scores)
    return scores


def _png(level: float, noise: int) -> bytes:
    """A 64x64 image of a brightness, with its own noise."""
    pixels = 255 * (level + 0.1 * torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(noise)))
    file = io.BytesIO()
    Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which the bright image won; the last row is a tie."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(9):
        first_wins = i % 2 == 0
        bright, dark = _png(0.7, 2 * i), _png(0.2, 2 * i + 1)
        label = 0.5 if i == 8 else float(first_wins)
        images = {"jpg_0": bright, "jpg_1": dark} if first_wins else {"jpg_0": dark, "jpg_1": bright}
        rows.append(images | {"label_0": label, "label_1": 1 - label, "caption": PROMPTS[i % 3].text})
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def tiny_online(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., OnlineTrainer]:
    """An online trainer of a random model in fp32, 4 images an iteration unless options say otherwise.

    It is of an algorithm in ONLINE, or of (its config, itself).
    """

    def make(algorithm: Any, family: str = "sd3", reward: Reward = BRIGHTNESS, **options: Any) -> OnlineTrainer:
        tiny = {
            "base": str(tiny_folder(family)),
            "name": "run",
            "output_dir": str(tmp_path),
            "reward": ["brightness"],
            "prompts": "tinyworld:composition/train",
            "dtype": "float32",
            "lora_rank": 2,
            "lora_alpha": 4,
            "learning_rate": 1e-2,
            "num_prompts": 2,
            "num_generations": 2,
            "batch_size": 4,
            "steps": 3,
            "cfg": 1.0,
            "ema_decay": 0.0,
            "sample_steps": 0,
        }
        config_type, trainer_type = ONLINE[algorithm] if isinstance(algorithm, str) else algorithm
        mix = RewardMix({"brightness": reward}, (1.0,))
        return trainer_type(config_type(**tiny | options), reward=mix, prompts=PROMPTS, eval_prompts=PROMPTS)

    return make


@pytest.fixture
def tiny_trainer(tiny_online: Callable[..., OnlineTrainer]) -> Callable[..., GRPOTrainer]:
    """A GRPO trainer of a random model; see `tiny_online`."""
    return partial(tiny_online, "grpo")


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium that logs its console and its network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine (apt-get install chromium chromium-driver)")
    from selenium import webdriver

    driver = shutil.which("chromedriver")
    assert driver, "chromium is installed, but not its driver (apt-get install chromium-driver)"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "no-first-run", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield session
    session.quit()


def requests_of(browser: Any) -> list[str]:
    """Addresses that the page has asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
