"""Hold the emoji world's detector beside a second one of another kind.

    python -m rlg.pretraining.agreement --base tiny-sd3-emoji --output results/emoji_detector

The second (`rlg.pretraining.keypoints`) is trained first, some minutes on one core. Both read drawn scenes, whose
truth is known, and a model's images for held-out prompts. Writes summary.json and README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class AgreementOptions:
    """Options of `python -m rlg.pretraining.agreement`. Raises ValueError for what makes no sense."""

    base: str = option("tiny-sd3-emoji", "the model whose images both read: a name or a folder")
    output: Path = option(help="folder of what is written")
    train_steps: int = option(1500, "of the second detector")
    scenes: int = option(500, "drawn scenes that both read")
    k: int = option(4, "images a prompt")
    cfg: tuple[float, ...] = option((1.0, 3.0), "classifier-free guidance scales of the images")
    seed: int = option(0, "of the second detector, the scenes and the noise")

    def __post_init__(self) -> None:
        for name in ("train_steps", "scenes", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


COMMAND = Command("python -m rlg.pretraining.agreement", AgreementOptions, __doc__)
if __name__ == "__main__":
    COMMAND.answer()

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from rewards.detectors.detection import Detection
from rlg import stats
from rlg.cli import fail_cleanly
from rlg.io import atomic, tables
from rlg.io.run_folder import CARD, SUMMARY
from rlg.models.policy import Policy
from rlg.pretraining import keypoints
from rlg.pretraining.samples import Sampling, generate
from rlg.pretraining.stage import generator_of
from rlg.prompts import Prompt
from rlg.tinyworld.worlds import EMOJI, world_of_words

Things = list[list[Detection]]
Names = Sequence[Sequence[tuple[str, str]]]  # of each image, noun and colour of what it shows
FIRST, SECOND = "matching (the reward)", "keypoints (learnt)"


def read_by_both(model: nn.Module, images_B3HW: Tensor) -> dict[str, Things]:
    """Read each image with both detectors."""
    from rewards.detectors import matching

    return {FIRST: [matching.detect(image) for image in images_B3HW], SECOND: keypoints.detect(model, images_B3HW)}


def names_of(read: Things) -> Names:
    """Nouns and colours alone."""
    return [[(thing.name, thing.color) for thing in things] for things in read]


def precision_and_recall(truth: Names, read: Names) -> tuple[float, float]:
    """Compare what is read with what is there, over all images.

    Precision is the share of the things read that are there; recall is the share of the things there that are read.
    """
    shared = sum((Counter(a) & Counter(b)).total() for a, b in zip(truth, read, strict=True))
    return shared / max(sum(map(len, read)), 1), shared / max(sum(map(len, truth)), 1)


def agreement(prompts: Sequence[Prompt], read: dict[str, Things]) -> dict[str, Any]:
    """Compare the strict verdicts of both detectors on the same images.

    `same` is the share of equal verdicts, `kappa` is Cohen's. Intervals are over prompts. `things` has precision and
    recall of the second detector, with the first as the truth.
    """
    from rewards.composition import score

    texts = [prompt.text for prompt in prompts]
    verdict = {
        name: np.array([score(p.metadata, t).strict for p, t in zip(prompts, things, strict=True)], dtype=float)
        for name, things in read.items()
    }
    same = (verdict[FIRST] == verdict[SECOND]).astype(float)
    a, b = verdict[FIRST].mean(), verdict[SECOND].mean()
    chance = float(a * b + (1 - a) * (1 - b))
    kappa = (float(same.mean()) - chance) / (1 - chance) if chance < 1 else None
    shares = {name: _estimate(values, texts) for name, values in (*verdict.items(), ("same", same))}
    things = precision_and_recall(*(names_of(read[name]) for name in (FIRST, SECOND)))
    tags = {tag: verdict[FIRST][rows].mean() for tag, rows in _by_tag(prompts).items()}
    counts = {"n": len(texts), "prompts": len(set(texts))}
    return {**counts, "strict": shares, "kappa": kappa, "things": things, "tags": tags}


def _by_tag(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Indices of the prompts of each tag."""
    tags = [prompt.metadata.get("tag", "") for prompt in prompts]
    return {tag: [i for i, own in enumerate(tags) if own == tag] for tag in dict.fromkeys(tags)}


def _estimate(values: np.ndarray, texts: Sequence[str]) -> dict[str, Any]:
    estimate = stats.grouped_mean(values, texts)
    return {"mean": estimate.mean, "ci95": [estimate.low, estimate.high]}


def readme(summary: dict[str, Any], command: str) -> str:
    """The content of README.md."""
    rows = [
        [scenes, name, *(f"{share:.1%}" for share in shares)]
        for scenes, by_name in summary["scenes"].items()
        for name, shares in by_name.items()
    ]
    options = summary["options"]
    parts = [
        "# Two detectors of the emoji world",
        f"`{command}`",
        f"Things (noun and colour) in {options['scenes']} drawn scenes, plain and spoilt by blur and noise:",
        tables.markdown(["scenes", "detector", "precision", "recall"], rows),
        f"Images of {options['base']} for held-out prompts, 20 ODE steps, seed {options['seed']}. "
        "Strict: the image shows all of its prompt. Intervals are 95%, over prompts.",
        tables.markdown(
            ["CFG", "n", f"strict, {FIRST}", f"strict, {SECOND}", "same verdict", "kappa", "things"],
            [_image_row(row) for row in summary["images"]],
        ),
        "Things: precision and recall of the second detector's things, as if the first one's were the truth.",
        f"Strict by kind of prompt, {FIRST}:",
        tables.markdown(["CFG", *summary["images"][0]["tags"]], [_tag_row(row) for row in summary["images"]]),
    ]
    return "\n\n".join(parts) + "\n"


def _image_row(row: dict[str, Any]) -> list[str]:
    shares = [stats.Estimate.of(each["mean"], each["ci95"]) for each in row["strict"].values()]
    kappa = "-" if row["kappa"] is None else f"{row['kappa']:.3f}"
    cells = [f"{row['cfg']:g}", str(row["n"]), *(f"{share:.1%}" for share in shares), kappa]
    return [*cells, ", ".join(f"{share:.1%}" for share in row["things"])]


def _tag_row(row: dict[str, Any]) -> list[str]:
    return [f"{row['cfg']:g}", *(f"{share:.1%}" for share in row["tags"].values())]


def summarise(options: AgreementOptions, policy: Policy, model: nn.Module) -> dict[str, Any]:
    """Content of summary.json: both detectors on scenes and on images."""
    generator = generator_of(options.seed, options.train_steps)  # no step of the training drew from it
    plain, layouts = keypoints.scenes(options.scenes, generator)
    truth = keypoints.names(layouts)
    scenes = {
        name: {k: precision_and_recall(truth, names_of(things)) for k, things in read_by_both(model, images).items()}
        for name, images in (("plain", plain), ("spoilt", keypoints.spoilt(plain, generator)))
    }
    prompts = [prompt for prompt in EMOJI.composition_prompts("test") for _ in range(options.k)]
    rows = []
    for cfg in options.cfg:
        images = generate(policy.pipe, prompts, Sampling(cfg=cfg, seed=options.seed))
        rows.append({"cfg": cfg, **agreement(prompts, read_by_both(model, images))})
    told = {"base": Path(options.base).name, "scenes": options.scenes, "k": options.k, "seed": options.seed}
    return {"options": told | {"train_steps": options.train_steps}, "scenes": scenes, "images": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; prints the path of README.md. Raises ValueError for a model of the shapes."""
    with fail_cleanly():
        options = COMMAND.parse(argv)
        policy = Policy.load(options.base, "float32", "cpu")
        if world_of_words(policy.pipe.tokenizer.get_vocab()) is not EMOJI:
            raise ValueError(f"{options.base} draws no emoji, and two detectors are there for emoji alone")
        summary = summarise(options, policy, keypoints.train(options.train_steps, options.seed))
        options.output.mkdir(parents=True, exist_ok=True)
        atomic.write_text(options.output / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
        command = f"{COMMAND.prog} --base {summary['options']['base']} --output {options.output}"
        atomic.write_text(options.output / CARD, readme(summary, command))
        print(options.output / CARD)


if __name__ == "__main__":
    main()
