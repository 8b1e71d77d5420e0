"""Does guidance with w play the KL coefficient beta / w?

    python -m rlg.equivalence --toy                                                  # laws that are known exactly
    python -m rlg.equivalence --config configs/equivalence/tiny_sd3_compressibility.yaml

The second draws many images of the base, whose rewards say what the exact optimum of every beta would score
(`rlg.equivalence.oracle`), then images of one tuned model guided with several w, and of others trained at betas of
their own; it goes on where it was interrupted. It reports, with intervals, how far guidance with w misses the oracle
at beta / w, as a share of the gap between base and tuned model: once with the beta that the model was trained at, and
once with the beta whose oracle scores what the tuned model does, which leaves out how well training hit its own
target; at w = 0 and w = 1 that is 0 by definition, and not shown. Models that were really trained at another beta are
held against guidance with w = beta_0 / beta, image by image of one noise.

A guided reward is the base's mean over all its images, plus the paired difference to w = 0 from the same noise.
Intervals are over prompts; each prompt that is left out has its matched beta found anew. A column of the oracle is
empty where fewer than TRUSTED of a prompt's base images count.

KL: the oracle's is that of the images. That of guidance is of the sampler's path and bounds it from above.
"""

from __future__ import annotations

from rlg.equivalence.experiment import COMMAND, EquivalenceOptions

if __name__ == "__main__":
    COMMAND.answer()

from collections.abc import Sequence
from pathlib import Path

from rlg.cli import fail_cleanly
from rlg.equivalence.runner import measure
from rlg.io import folders


def run(options: EquivalenceOptions) -> None:
    """Do what the options say and print what was written."""
    import rewards
    from rlg.equivalence import toy

    if options.config is None:
        folder = options.output or Path("runs/equivalence/toy")
        with folders.held(folder):
            written = toy.run(folder, options.samples, options.steps, options.seed)
    else:
        folder = options.output or Path("runs/equivalence") / options.config.stem
        with folders.held(folder):
            written = measure(options, rewards.build([options.reward]), folder)
        print(written[1].read_text())
    for path in written:
        print(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(COMMAND.parse(argv))


if __name__ == "__main__":
    main()
