"""Draw preference pairs for which the best reachable result is known.

    python -m rlg.preferences --base tiny-sd3 --output runs/prefs-sd3 --pairs 2000 --utility composition

Both images of a pair come from the base model, for one prompt, by the ODE sampler. A Bradley-Terry annotator with
utility u and temperature T labels them. The utility is a mix of rewards of the stored images.

    P(the first wins) = sigmoid((u_0 - u_1) / T)            equal utilities: a coin flip; no pair is a tie
    DPO's optimum     = p_base * exp(u / (beta T))          beta in nats of log-likelihood
    ceiling           = E max(P, 1 - P)                     largest expected share of labels that a reward model meets
    entropy           = E H(P), in nats                     least expected loss of a reward model, implicit or not

    train.parquet, test.parquet   jpg_0, jpg_1 (PNG files), label_0, label_1, caption; utility_0, utility_1,
                                  first_wins_probability, and the prompt's metadata as JSON
    metadata.json                 the settings; for each split: counts, ceiling, entropy, and the share of labels that
                                  the true utility agrees with (ties count half)

The columns are Pick-a-Pic's. The test split has held-out prompts. Noise and labels follow from (seed, split), and no
evaluation has the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.choices import DTYPES, WORLD_MODELS
from rlg.config_parser import Command, option
from rlg.pretraining.settings import PairSettings


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Options of `python -m rlg.preferences`."""

    base: str = option("tiny-sd3", f"{', '.join(WORLD_MODELS)}, a folder or a hub id")
    output: Path = option(help="folder to make")
    pairs: int = option(2000, "pairs to train on")
    test_pairs: int = option(500, "held-out pairs")
    utility: tuple[str, ...] = option(("composition",), "rewards whose weighted sum the annotator goes by")
    utility_weights: tuple[float, ...] | None = option(None, "their weights (default: 1 each)")
    temperature: float = option(PairSettings.temperature, "of the annotator; low is consistent")
    prompts: str = option("tinyworld:composition/train", "of the training pairs")
    test_prompts: str = option("tinyworld:composition/test", "of the held-out pairs")
    prompt_column: str | None = option(None, "of prompt files with columns (default: prompt)")
    cfg: float = option(PairSettings.cfg, "classifier-free guidance scale; 1 is off")
    steps: int = option(PairSettings.steps, "ODE steps")
    seed: int = option(PairSettings.seed, "decides noise and labels")
    batch_size: int = option(PairSettings.batch_size, "images a batch")
    dtype: str = option("float32", "of the weights", choices=DTYPES)
    device: str | None = option(None, "default: cuda if there is one, else cpu")
    overwrite: bool = option(False, "replace the pairs that are in the output folder")


COMMAND = Command("python -m rlg.preferences", PreferenceOptions, __doc__)
if __name__ == "__main__":
    COMMAND.answer()

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rewards import RewardMix
from rlg.cli import fail_cleanly
from rlg.diffusion import sampling
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.guidance.guided import with_cfg
from rlg.io.pixels import levels
from rlg.models import fingerprint
from rlg.models.loading import device_of
from rlg.models.policy import Policy
from rlg.prompts import Prompt, columns
from rlg.tasks import prompt_sets

METADATA = "metadata.json"
_FORMAT = "rlg preference pairs, Pick-a-Pic columns"


@dataclass(frozen=True)
class Split:
    """The N pairs of one split."""

    prompts: list[Prompt]
    png_N2: list[tuple[bytes, bytes]]
    utility_N2: Tensor  # float64
    probability_N: Tensor  # probability that the first wins, float64
    first_wins_N: Tensor  # the annotator's verdict, bool

    def columns(self) -> dict[str, list[Any]]:
        """The columns as they are stored."""
        return {
            "caption": [prompt.text for prompt in self.prompts],
            "jpg_0": [pair[0] for pair in self.png_N2],
            "jpg_1": [pair[1] for pair in self.png_N2],
            "label_0": self.first_wins_N.double().tolist(),
            "label_1": (~self.first_wins_N).double().tolist(),
            "utility_0": self.utility_N2[:, 0].tolist(),
            "utility_1": self.utility_N2[:, 1].tolist(),
            "first_wins_probability": self.probability_N.tolist(),
            "metadata": [json.dumps(prompt.metadata) for prompt in self.prompts],
        }

    def summary(self) -> dict[str, Any]:
        """Counts, ceiling and entropy."""
        gap_N = self.utility_N2[:, 0] - self.utility_N2[:, 1]
        agrees_N = torch.where(gap_N == 0, 0.5, ((gap_N > 0) == self.first_wins_N).double())
        return {
            "pairs": len(self.prompts),
            "captions": len({prompt.text for prompt in self.prompts}),
            "equal_utilities": int((gap_N == 0).sum()),
            "first_wins": int(self.first_wins_N.sum()),
            "ceiling": ceiling(self.probability_N),
            "entropy": entropy(self.probability_N),
            "utility_agrees": float(agrees_N.mean()),
            "utility_mean": float(self.utility_N2.mean()),
            "utility_std": float(self.utility_N2.std(unbiased=False)),
        }


def win_probability(utility_N2: Tensor, temperature: float) -> Tensor:
    """(N,) probabilities that the first of two wins, in float64.

    They are those of Bradley and Terry.
    """
    utility_N2 = utility_N2.double()
    return torch.sigmoid((utility_N2[:, 0] - utility_N2[:, 1]) / temperature)


def annotate(utility_N2: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of pairs, drawn from their probabilities.

    Returns (N,) Bradley-Terry's probabilities that the first wins, and (N,) bool labels.
    """
    probability_N = win_probability(utility_N2, temperature)
    return probability_N, torch.rand(len(probability_N), generator=generator, dtype=torch.float64) < probability_N


def ceiling(probability_N: Tensor) -> float:
    """The best expected accuracy on labels that are drawn with these probabilities."""
    return float(torch.maximum(probability_N, 1 - probability_N).mean())


def entropy(probability_N: Tensor) -> float:
    """The least expected log loss on such labels, in nats."""
    both = torch.stack([probability_N, 1 - probability_N])
    return float(-torch.xlogy(both, both).sum(dim=0).mean())


def draw(
    policy: Policy, utility: RewardMix, prompts: Sequence[Prompt], split: str, pairs: int, settings: PairSettings
) -> Split:
    """Sample and label `pairs` pairs.

    Prompts take turns, in a random order. The pairs are a function of (settings.seed, split), the prompts and the
    model. Raises RewardError as the utility does.
    """
    seed = _seed_of(settings.seed, split)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    turns = [(order[i % len(order)], i // len(order)) for i in range(pairs)]  # (prompt, index among its pairs)
    predict = with_cfg(policy.reference, policy.encode([""]), settings.cfg)
    schedule = policy.schedule(settings.steps, "ode", 0.0)
    files: list[bytes] = []
    scores = []
    bar = tqdm(total=2 * pairs, desc=split, unit="image", disable=None, mininterval=1)
    for start in range(0, pairs, settings.batch_size // 2):
        part = turns[start : start + settings.batch_size // 2]
        ids = [SampleId(seed, prompt, 2 * turn + side) for prompt, turn in part for side in (0, 1)]
        rows = [prompts[sample.prompt] for sample in ids]
        noise = SampleNoise(ids, policy.latent_shape(), policy.device)
        latents = sampling.sample(predict, schedule, policy.encode([row.text for row in rows]), noise)
        pixels_BHW3 = levels(policy.decode(latents)).cpu().permute(0, 2, 3, 1)
        files += [_png(pixels) for pixels in pixels_BHW3]
        stored_B3HW = pixels_BHW3.permute(0, 3, 1, 2).contiguous().float() / 255
        scores.append(utility(stored_B3HW, [row.text for row in rows], [row.metadata for row in rows]).total_B)
        bar.update(len(ids))
    bar.close()
    utility_N2 = torch.cat(scores).double().reshape(-1, 2)
    probability_N, first_wins_N = annotate(utility_N2, settings.temperature, generator)
    return Split(
        prompts=[prompts[prompt] for prompt, _ in turns],
        png_N2=list(zip(files[::2], files[1::2], strict=True)),
        utility_N2=utility_N2,
        probability_N=probability_N,
        first_wins_N=first_wins_N,
    )


def _seed_of(seed: int, split: str) -> int:
    """A seed of a split.

    Neither the other split nor an evaluation starts from the same noise.
    """
    digest = hashlib.blake2b(f"preferences/{seed}/{split}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _png(pixels_HW3: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise ValueError for a folder that must not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not _is_ours(folder):
        raise ValueError(f"{folder} holds something else than preference pairs; give --output another name")
    if not overwrite:
        raise ValueError(f"{folder} exists; give --overwrite or --output another name")


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / METADATA).read_text())["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(folder: Path, splits: Mapping[str, Split], about: Mapping[str, Any], overwrite: bool = False) -> dict:
    """Write a set, and return its metadata.

    It is written elsewhere until it is whole. Raises ValueError as `check_output` does.
    """
    check_output(folder, overwrite)
    metadata = {"format": _FORMAT, **about, "splits": {name: split.summary() for name, split in splits.items()}}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, split in splits.items():
        datasets.Dataset.from_dict(split.columns()).to_parquet(str(temporary / f"{name}.parquet"))
    (temporary / METADATA).write_text(json.dumps(metadata, indent=1))
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*sorted(temporary.glob("*.parquet")), temporary / METADATA]:  # other files in the folder stay
        file.replace(folder / file.name)
    temporary.rmdir()
    return metadata


def run(options: PreferenceOptions) -> dict[str, Any]:
    """Draw, label and write both splits.

    Returns the metadata. Raises ValueError for a user's mistake.
    """
    import rewards

    sizes = {"train": options.pairs, "test": options.test_pairs}
    if min(sizes.values()) < 1:
        raise ValueError(f"--pairs ({options.pairs}) and --test_pairs ({options.test_pairs}) must be at least 1")
    settings = PairSettings(options.temperature, options.steps, options.cfg, options.seed, options.batch_size)
    device = device_of(options.device)
    check_output(options.output, options.overwrite)
    sources = {"train": options.prompts, "test": options.test_prompts}
    loaded = prompt_sets.load_each(list(sources.values()), options.prompt_column)
    prompts = dict(zip(sources, loaded, strict=True))
    utility = rewards.build(options.utility, options.utility_weights, device)
    for rows in prompts.values():
        utility.check(*columns(rows))
    policy = Policy.load(options.base, options.dtype, device)
    splits = {name: draw(policy, utility, prompts[name], name, size, settings) for name, size in sizes.items()}
    about = {
        "model": options.base,
        "dtype": options.dtype,
        "utility": dict(zip(utility.names, utility.weights, strict=True)),
        "annotator": "Bradley-Terry: P(first wins) = sigmoid((utility_0 - utility_1) / temperature)",
        "sampler": "ode",
        **asdict(settings),
        "prompts": sources,
        **fingerprint.record({}, options.base, {f"{name} prompts": rows for name, rows in prompts.items()}),
    }
    metadata = write(options.output, splits, about, options.overwrite)
    print(report(metadata))
    print(options.output)
    return metadata


def report(metadata: Mapping[str, Any]) -> str:
    """A summary of the pairs: first all, then each split.

    It has one line for each.
    """
    utility = " + ".join(f"{weight:g} {name}" for name, weight in metadata["utility"].items())
    lines = [f"{metadata['model']}, utility {utility}, temperature {metadata['temperature']:g}"]
    for name, row in metadata["splits"].items():
        lines.append(
            f"{name}: {row['pairs']} pairs of {row['captions']} captions, {row['equal_utilities']} with equal "
            f"utilities (labelled by coin flip); best reachable accuracy {row['ceiling']:.1%}, "
            f"loss {row['entropy']:.4f}; the true utility agrees with {row['utility_agrees']:.1%} of these labels"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(COMMAND.parse(argv))


if __name__ == "__main__":
    main()
