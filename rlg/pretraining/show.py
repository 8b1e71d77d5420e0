"""Show a tinyworld base model: images, and composition on held-out prompts.

python -m rlg.pretraining.show --base tiny-sd3 --cfg 3 --output tiny-sd3.png
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlg.cli import fail_cleanly
from rlg.pretraining.settings import SHOW, ShowSettings

if TYPE_CHECKING:
    from torch import Tensor

    from rlg.prompts import Prompt

_COLUMNS, _ROWS = 12, 5


def run(settings: ShowSettings) -> None:
    """Print accuracies with 95% intervals and save the grid. Raises ValueError for a model of no world."""
    import torch

    from rlg.models.loading import device_of
    from rlg.models.policy import Policy
    from rlg.pretraining.samples import Sampling, generate, sheet, strict
    from rlg.prompts import spread
    from rlg.tinyworld.worlds import world_of_words

    policy = Policy.load(settings.base, settings.dtype, device_of(settings.device))
    world = world_of_words(policy.pipe.tokenizer.get_vocab())
    prompts = [prompt for prompt in world.composition_prompts("test") for _ in range(settings.k)]
    how = Sampling(cfg=settings.cfg, steps=settings.steps, seed=settings.seed, batch_size=settings.batch_size)
    images = generate(policy.pipe, prompts, how)
    print(report(settings, prompts, strict(images, prompts)))
    if settings.output:
        signs = world.signs("test", _COLUMNS, torch.Generator().manual_seed(settings.seed)) if world.signs else []
        rows = _ROWS - 1 if signs else _ROWS
        shown = [images[i] for i in spread(prompts, _COLUMNS * rows)]
        shown += generate(policy.pipe, signs, how) if signs else []
        sheet(torch.stack(shown), _COLUMNS).save(settings.output)
        print(settings.output)


def report(settings: ShowSettings, prompts: Sequence[Prompt], strict_B: Tensor) -> str:
    """Report the share of strictly right images, over all and by tag.

    The interval is 95%, over prompts.
    """
    from rlg import stats

    texts, values = [p.text for p in prompts], strict_B.numpy()
    total = stats.grouped_mean(values, texts)
    how = f"CFG {settings.cfg:g}, {settings.steps} ODE steps, seed {settings.seed}"
    lines = [f"{settings.base}, {how}, {len(prompts)} images of {len(set(texts))} prompts"]
    lines.append(f"composition (strict): {total:.1%}")
    for tag in dict.fromkeys(p.metadata["tag"] for p in prompts):
        rows = [i for i, p in enumerate(prompts) if p.metadata["tag"] == tag]
        lines.append(f"  {tag:14s} {values[rows].mean():6.1%}  ({len(rows)} images)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(SHOW.parse(argv))


if __name__ == "__main__":
    main()
