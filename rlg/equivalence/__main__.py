"""Experiment: does guidance with w play the KL coefficient beta / w?

    python -m rlg.equivalence --toy                                                  # laws that are known exactly
    python -m rlg.equivalence --config configs/equivalence/tiny_sd3_compressibility.yaml

The second draws many images of the base, of one tuned model guided with several w, and of models trained at betas of
their own. It goes on where it was interrupted. Intervals are over prompts.

    oracle    score of the exact optimum of any beta, from the rewards of the base (`rlg.equivalence.oracle`). A column
              of it is empty where fewer than TRUSTED of a prompt's base images count
    reward    of guidance: the base's mean over all its images, plus the paired difference to w = 0 from the same noise
    miss      reward of guidance less the oracle's at beta / w, as a share of the gap between base and tuned model
    matched   the same with the beta whose oracle scores as the tuned model does, found anew for each prompt that is
              left out. It leaves out how well training hit its own target. At w = 0 and w = 1 it is 0 by definition,
              and not shown
    trained   models of another beta, against guidance with w = beta_0 / beta, image by image of one noise
    KL        of the oracle: that of the images. Of guidance: that of the sampler's path, which bounds it from above
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
    """Run the experiment, or the known laws, and print the results."""
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
    """Run the command line."""
    with fail_cleanly():
        run(COMMAND.parse(argv))


if __name__ == "__main__":
    main()
