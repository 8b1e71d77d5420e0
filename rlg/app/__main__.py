"""Serve a page with images of one noise at several w.

A slider moves w.

python -m rlg.app --ckpt runs/NAME/checkpoint-N
"""

from __future__ import annotations

from rlg.app.options import COMMAND, AppOptions

if __name__ == "__main__":
    COMMAND.answer()

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlg.app.generator import MAX_TEXT, ImageGenerator, ImageRequest, load_experts
from rlg.app.page import LOOPBACK, Page, build, gradio_module, launch
from rlg.cli import fail_cleanly
from rlg.evaluation.naming import home_of, labels_of, short_names
from rlg.io.run_folder import run_settings
from rlg.models.loading import base_of, device_of
from rlg.models.policy import Policy
from rlg.models.tuned_model import resolve
from rlg.prompts import spread
from rlg.tasks import prompt_sets

_EXAMPLES = 6


def load(options: AppOptions) -> tuple[ImageGenerator, Page]:
    """Load models and rewards, and the start of the page.

    Raises ValueError for options that do not fit together.
    """
    import rewards

    device = device_of(options.device)
    models = [resolve(ckpt) for ckpt in options.ckpt]
    bases = {model.path: base_of(model, options.base) for model in models}
    if len(set(bases.values())) > 1:
        raise ValueError("the adapters have several bases: " + ", ".join(f"{c} {b}" for c, b in bases.items()))
    own = run_settings(Path(options.ckpt[0]))
    chosen = {
        name: getattr(options, name) for name in ("level", "resolution", "dtype") if getattr(options, name) is not None
    }
    own |= chosen
    source = options.prompts or (own["prompts"] if str(own.get("prompts")).startswith("tinyworld:") else None)
    (prompts,) = prompt_sets.load_each([source], options.prompt_column)
    reward = rewards.build(options.reward, device=device) if options.reward else None
    like_the_run = {name: own.get(name) for name in ("t5_length", "vae_dtype")}
    policy = Policy.load(bases[options.ckpt[0]], own.get("dtype", "float32"), device, **like_the_run)
    experts = load_experts(policy, models)
    generator = ImageGenerator(
        policy,
        experts,
        reward,
        {prompt.text: prompt.metadata for prompt in prompts},
        level=own.get("level", 0.7),
        max_steps=options.max_steps,
        resolution=own.get("resolution"),
    )
    texts = [prompts[i].text for i in spread(prompts, _EXAMPLES)] if prompts else []
    texts = [text for text in texts if len(text) <= MAX_TEXT] or ["a photo of a red circle"]
    request = ImageRequest(
        texts[0], "", 0, 1, min(own.get("steps", 20), options.max_steps), own.get("cfg", 1.0), _sampler(own, generator)
    )
    labels = labels_of([(home_of(model)[0], Path(model.path).name) for model in models])
    labels = short_names(labels) if len(labels) > 1 else labels
    return generator, Page(bases[options.ckpt[0]], tuple(labels), tuple(texts), request, options.max_w)


def _sampler(own: dict[str, Any], generator: ImageGenerator) -> str:
    return own["kernel"] if own.get("kernel") in generator.samplers else "ode"


def run(options: AppOptions) -> None:
    """Load, build and serve."""
    gradio_module()  # if it is missing, say so before gigabytes are read
    blocks = build(*load(options))
    if options.host not in (LOOPBACK, "localhost", "::1"):
        print(
            f"{options.host}: whoever reaches it can use this machine to make images; there is no password",
            file=sys.stderr,
        )
    launch(blocks, options.host, options.port)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with fail_cleanly():
        run(COMMAND.parse(argv))


if __name__ == "__main__":
    main()
