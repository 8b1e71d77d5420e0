"""A page with a slider: one prompt, the same noise, and the images of several w side by side, in the browser.

    pip install 'rlg[app]'
    python -m rlg.app --ckpt runs/NAME/checkpoint-N                              # then open http://127.0.0.1:7860
    python -m rlg.app --ckpt runs/A/checkpoint-N --ckpt runs/B/checkpoint-N      # a share for each of several adapters

It runs on this machine and for it: it listens on loopback unless --host says otherwise, makes no tunnel, loads nothing
from elsewhere and reports to nobody. One image is made at a time, the others wait in a queue of limited length; what a
visitor may ask for is bounded (`rlg.studio`), and nothing that is made is written to disk.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rlg import prompts as prompt_sets
from rlg.blend_evaluator import labels_of, short_names
from rlg.cli import TUNED_HELP, Parser, fail_cleanly
from rlg.config import run_settings
from rlg.evaluate import home_of
from rlg.policy import DTYPES, Policy, base_of
from rlg.studio import MAX_CFG, MAX_IMAGES, MAX_TEXT, Column, Shot, Studio, load_experts, scales_of, weights_of
from rlg.style import render

LOOPBACK = "127.0.0.1"
_WAITING = 8  # visitors in the queue
_SMALL = 256  # pixels: images up to this side are sent as PNG, whose pixels the page then shows as they are
_EXAMPLES = 6
_SEEDS = 2**31  # that the page draws from
_EMPTY = '<div class="rlg-empty">Write a prompt, choose w, and press Generate.</div>'


@dataclass(frozen=True)
class Page:
    """What the page begins with."""

    base: str
    labels: tuple[str, ...]  # of the adapters
    examples: tuple[str, ...]  # prompts
    shot: Shot
    max_w: float


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.app", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", "--tuned", dest="ckpts", metavar="TUNED", action="append", help=TUNED_HELP + "; several blend")
    add("--base", help="base model (default: the one that the adapter was trained on)")
    add("--rewards", nargs="+", default=[], help="rewards to show below each image (python -m rewards --list)")
    add("--prompts", help="prompt set of the examples, and of metadata for rewards (default: the run's tinyworld set)")
    add("--max_w", type=float, default=4.0, help="end of the slider")
    add("--max_steps", type=int, default=50, help="most denoising steps that the page lets one choose")
    add("--level", type=float, help="noise level of a stochastic sampler (default: the run's own)")
    add("--resolution", type=int, help="side of the images in pixels (default: the run's own)")
    add("--dtype", choices=sorted(DTYPES), help="default: the run's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--host", default=LOOPBACK, help="address to listen on; another than loopback lets others in, without password"
    )
    add("--port", type=int, default=7860)
    return parser


def load(args: argparse.Namespace) -> tuple[Studio, Page]:
    """Models, rewards and what the page begins with. Raises ValueError for what does not fit together."""
    import rewards

    if not args.ckpts:
        raise ValueError(f"--ckpt is needed (or --tuned): {TUNED_HELP}")
    if not 1 <= args.max_w <= 100 or args.max_steps < 1:
        raise ValueError(
            f"--max_w ({args.max_w:g}) must be between 1 and 100, --max_steps ({args.max_steps}) positive"
        )
    bases = {ckpt: base_of(ckpt, args.base) for ckpt in args.ckpts}
    if len(set(bases.values())) > 1:
        raise ValueError("the adapters have several bases: " + ", ".join(f"{c} {b}" for c, b in bases.items()))
    own = run_settings(Path(args.ckpts[0]))
    chosen = {
        name: getattr(args, name) for name in ("level", "resolution", "dtype") if getattr(args, name) is not None
    }
    own |= chosen
    source = args.prompts or (own["prompts"] if str(own.get("prompts")).startswith("tinyworld:") else None)
    prompts = prompt_sets.load(source) if source else []
    reward = rewards.build(args.rewards, device=args.device) if args.rewards else None
    policy = Policy.load(bases[args.ckpts[0]], own.get("dtype", "float32"), args.device)
    experts = load_experts(policy, args.ckpts)
    studio = Studio(
        policy,
        experts,
        reward,
        {prompt.text: prompt.metadata for prompt in prompts},
        level=own.get("level", 0.7),
        max_steps=args.max_steps,
        resolution=own.get("resolution"),
    )
    texts = [prompts[i].text for i in prompt_sets.spread(prompts, _EXAMPLES)] if prompts else []
    texts = [text for text in texts if len(text) <= MAX_TEXT] or ["a photo of a red circle"]
    shot = Shot(
        texts[0], "", 0, 1, min(own.get("steps", 20), args.max_steps), own.get("cfg", 1.0), _sampler(own, studio)
    )
    labels = labels_of([(home_of(ckpt)[0], Path(ckpt).name) for ckpt in args.ckpts])
    labels = short_names(labels) if len(labels) > 1 else labels
    return studio, Page(bases[args.ckpts[0]], tuple(labels), tuple(texts), shot, args.max_w)


def _sampler(own: dict[str, Any], studio: Studio) -> str:
    return own["sampler"] if own.get("sampler") in studio.samplers else "ode"


def strip(scales: Sequence[float], columns: Sequence[Column], chosen: float, note: str, blend: bool = False) -> str:
    """HTML of images side by side, the best score of each row of images marked."""
    rows = []
    for w, column in zip(scales, columns, strict=True):
        images = []
        for k, (image, scores) in enumerate(zip(column.images, column.scores, strict=True)):
            best = {name: max(other.scores[k].get(name, score) for other in columns) for name, score in scores.items()}
            worst = {
                name: min(other.scores[k].get(name, score) for other in columns) for name, score in scores.items()
            }
            marked = [(n, f"{s:.3f}", s == best[n] > worst[n]) for n, s in scores.items()]
            images.append({"uri": data_uri(image), "scores": marked})
        role = {0.0: "base", 1.0: "blend" if blend else "tuned"}.get(w, "")
        rows.append({"w": f"{w:g}", "role": role, "chosen": w == float(f"{chosen:g}"), "images": images})
    return render("app.html.template", columns=rows, note=note)


def data_uri(image: Image.Image) -> str:
    """A small image as it is, a larger one as WebP."""
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= _SMALL else "webp"
    image.save(buffer, kind.upper(), **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def answer(studio: Studio, page: Page, values: Sequence[Any], progress: Callable[..., Any]) -> str:
    """The strip for what the page's inputs hold, in the order of `_inputs`. Raises ValueError for what is refused."""
    prompt, w, compare, k, steps, cfg, negative, sampler, seed, *shares = values
    numbers = [value for value in (w, k, steps, cfg, seed, *shares)]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or v != v or abs(v) > 2**63 for v in numbers):
        raise ValueError("w, images, steps, CFG, seed and shares must be numbers")
    shot = Shot(
        str(prompt or "").strip(), str(negative or ""), int(seed), int(k), int(steps), float(cfg), str(sampler)
    )
    scales, started, done = scales_of(str(compare or ""), w, page.max_w), time.perf_counter(), 0

    def tick() -> None:
        nonlocal done
        progress((done, len(scales) * shot.steps), desc=f"w = {scales[len(columns)]:g}", unit="steps")
        done += 1

    columns: list[Column] = []
    for each in scales:
        columns.append(studio.column(shot, weights_of(each, shares or (1.0,)), tick))
        done = len(columns) * shot.steps
    cfg_said = "" if shot.cfg == 1 else f", CFG {shot.cfg:g}"
    seconds = time.perf_counter() - started
    note = f"“{shot.prompt}”, seed {shot.seed}, {shot.steps} {shot.sampler} steps{cfg_said}; {seconds:.1f} s"
    return strip(scales, columns, w, note, blend=len(shares) > 1)


def build(studio: Studio, page: Page) -> Any:
    """The page, a gradio.Blocks with its queue. Raises ValueError if gradio is not installed."""
    gr = _gradio()

    def generate(*values: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 - how gradio hands it over
        try:
            return answer(studio, page, values, progress)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    with gr.Blocks(title="RLG", analytics_enabled=False) as blocks:
        gr.HTML(_heading(page))
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                inputs, asked = _controls(gr, studio, page)
            with gr.Column(scale=9, min_width=480):
                output = gr.HTML(_EMPTY, elem_id="images")
        options = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "one"}
        for event in asked:
            event(generate, inputs, output, trigger_mode="always_last", **options)
    return blocks.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)


def _heading(page: Page) -> str:
    names = html.escape(" + ".join(page.labels))
    tuned, the_tuned = ("blend", "the blend") if len(page.labels) > 1 else ("tuned", "the tuned model")
    return (
        f'<div class="rlg-head"><h1>RLG</h1><code>base + w · ({tuned} − base)</code>'
        f"<p>{names} on {html.escape(page.base)}. w = 0 is the base, w = 1 is {the_tuned}.</p></div>"
    )


def _controls(gr: Any, studio: Studio, page: Page) -> tuple[list[Any], list[Any]]:
    """(inputs in the order of `answer`, the events that ask for images)."""
    shot = page.shot
    prompt = gr.Textbox(shot.prompt, label="Prompt", lines=2, max_length=MAX_TEXT, elem_id="prompt")
    w = gr.Slider(0, page.max_w, min(1.5, page.max_w), step=0.05, label="w", elem_id="w")
    shares = (
        [
            gr.Slider(0, 1, 0.5, step=0.05, label=f"share of {label}", elem_id=f"share-{i}")
            for i, label in enumerate(page.labels)
        ]
        if len(page.labels) > 1
        else []
    )
    with gr.Row():
        button = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_id="generate")
        dice = gr.Button("New seed", scale=2, min_width=90, elem_id="dice")
    with gr.Row():
        seed = gr.Number(shot.seed, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
        k = gr.Slider(1, MAX_IMAGES, shot.k, step=1, label="Images", min_width=120, elem_id="k")
    with gr.Accordion("Sampling", open=False):
        compare = gr.Textbox("0 1", label="Side by side with w =", max_length=80, elem_id="compare")
        steps = gr.Slider(1, studio.max_steps, shot.steps, step=1, label="Steps", elem_id="steps")
        sampler = gr.Dropdown(list(studio.samplers), value=shot.sampler, label="Sampler", elem_id="sampler")
        cfg = gr.Slider(1, MAX_CFG, shot.cfg, step=0.1, label="CFG (1 is off)", elem_id="cfg")
        negative = gr.Textbox(
            shot.negative, label="Negative prompt", max_length=MAX_TEXT, visible=shot.cfg > 1, elem_id="negative"
        )
    if page.examples:
        gr.Examples([[text] for text in page.examples], [prompt], label="Prompts", api_visibility="private")
    quiet = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    drawn = dice.click(lambda: random.randrange(_SEEDS), None, seed, **quiet)
    cfg.change(lambda value: gr.update(visible=value > 1), cfg, negative, **quiet)
    inputs = [prompt, w, compare, k, steps, cfg, negative, sampler, seed, *shares]
    moved = [slider.release for slider in (w, *shares)]
    return inputs, [button.click, prompt.submit, drawn.then, *moved]


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the app needs gradio ({error}): pip install 'rlg[app]'") from error
    return gradio


def launch(blocks: Any, host: str, port: int, wait: bool = True) -> str:
    """Serve the page, until Ctrl-C if `wait`; returns its address. Raises OSError for a port that is taken."""
    gr = _gradio()
    system = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # names: nothing is fetched
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=system[0], font_mono=system[1])
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        max_file_size=1,  # bytes: nothing here takes files, and gradio would
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css=(Path(__file__).parent / "app.css.template").read_text(encoding="utf-8"),
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    print(url, flush=True)
    if wait:
        blocks.block_thread()
    return url


def run(args: argparse.Namespace) -> None:
    """Load, build and serve."""
    _gradio()  # missing? say so before gigabytes are read
    blocks = build(*load(args))
    if args.host not in (LOOPBACK, "localhost", "::1"):
        print(
            f"{args.host}: whoever reaches it can use this machine to make images; there is no password",
            file=sys.stderr,
        )
    launch(blocks, args.host, args.port)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    with fail_cleanly():
        run(args)


if __name__ == "__main__":
    main()
