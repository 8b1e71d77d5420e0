"""Page with a slider over w: images of one noise.

    pip install '.[app]'
    python -m rlg.app --ckpt runs/NAME/checkpoint-N                              # then open http://127.0.0.1:7860
    python -m rlg.app --ckpt runs/A/checkpoint-N --ckpt runs/B/checkpoint-N      # a share for each of several adapters

It runs on this machine and for it: it listens on loopback unless --host says otherwise, makes no tunnel, loads nothing
from elsewhere and reports to nobody. It makes one image at a time; other requests wait in a queue of limited length.
`rlg.app.generator` bounds a visitor's request, and `rewards.server.callers` refuses pages of other sites. It writes no
image to disk.
"""

from __future__ import annotations

import base64
import html
import io
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rlg import extras
from rlg.app.generator import (
    MAX_CFG,
    MAX_IMAGES,
    MAX_TEXT,
    Column,
    ImageGenerator,
    ImageRequest,
    scales_of,
    weights_of,
)
from rlg.reports.theme import render

TEMPLATES = Path(__file__).parent / "templates"
LOOPBACK = "127.0.0.1"
_WAITING = 8  # visitors in the queue
_SMALL = 256  # pixels: images up to this side are sent as PNG, whose pixels the page then shows as they are
_SEEDS = 2**31  # seeds that the page draws from
_EMPTY = '<div class="rlg-empty">Write a prompt, choose w, and press Generate.</div>'


@dataclass(frozen=True)
class Page:
    """Content of the page at its start."""

    base: str
    labels: tuple[str, ...]  # names of the adapters
    examples: tuple[str, ...]  # prompts
    request: ImageRequest
    max_w: float


def strip(scales: Sequence[float], columns: Sequence[Column], chosen: float, note: str, blend: bool = False) -> str:
    """HTML of images side by side.

    The best score of each row of images is marked.
    """
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
    return render("app.html.template", TEMPLATES, columns=rows, note=note)


def data_uri(image: Image.Image) -> str:
    """A small image as it is, a larger one as WebP."""
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= _SMALL else "webp"
    image.save(buffer, kind.upper(), **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def answer(generator: ImageGenerator, page: Page, values: Sequence[Any], progress: Callable[..., Any]) -> str:
    """Make the strip for the values of the page's inputs.

    They are in the order of `_controls`. Raises ValueError for values that are refused.
    """
    prompt, w, compare, k, steps, cfg, negative, sampler, seed, *shares = values
    numbers = [value for value in (w, k, steps, cfg, seed, *shares)]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or v != v or abs(v) > 2**63 for v in numbers):
        raise ValueError("w, images, steps, CFG, seed and shares must be numbers")
    request = ImageRequest(
        str(prompt or "").strip(), str(negative or ""), int(seed), int(k), int(steps), float(cfg), str(sampler)
    )
    scales, started, done = scales_of(str(compare or ""), w, page.max_w), time.perf_counter(), 0

    def tick() -> None:
        nonlocal done
        progress((done, len(scales) * request.steps), desc=f"w = {scales[len(columns)]:g}", unit="steps")
        done += 1

    columns: list[Column] = []
    for each in scales:
        columns.append(generator.column(request, weights_of(each, shares or (1.0,)), tick))
        done = len(columns) * request.steps
    cfg_said = "" if request.cfg == 1 else f", CFG {request.cfg:g}"
    seconds = time.perf_counter() - started
    unable = "".join(
        f"; {name} cannot judge this prompt: {why}" for name, why in generator.unscorable(request.prompt).items()
    )
    how = f"seed {request.seed}, {request.steps} {request.sampler} steps{cfg_said}"
    note = f"“{request.prompt}”, {how}; {seconds:.1f} s{unable}"
    return strip(scales, columns, w, note, blend=len(shares) > 1)


def build(generator: ImageGenerator, page: Page) -> Any:
    """Build the page, a gradio.Blocks with its queue.

    Raises ValueError if gradio is not installed.
    """
    gr = gradio_module()

    def generate(*values: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 - how gradio hands it over
        try:
            return answer(generator, page, values, progress)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    with gr.Blocks(title="RLG", analytics_enabled=False) as blocks:
        gr.HTML(_heading(page))
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                inputs, asked = _controls(gr, generator, page)
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


def _controls(gr: Any, generator: ImageGenerator, page: Page) -> tuple[list[Any], list[Any]]:
    """Make the controls.

    Returns (inputs in the order of `answer`, the events that ask for images).
    """
    request = page.request
    prompt = gr.Textbox(request.prompt, label="Prompt", lines=2, max_length=MAX_TEXT, elem_id="prompt")
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
        seed = gr.Number(request.seed, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
        k = gr.Slider(1, MAX_IMAGES, request.k, step=1, label="Images", min_width=120, elem_id="k")
    with gr.Accordion("Sampling", open=False):
        compare = gr.Textbox("0 1", label="Side by side with w =", max_length=80, elem_id="compare")
        steps = gr.Slider(1, generator.max_steps, request.steps, step=1, label="Steps", elem_id="steps")
        sampler = gr.Dropdown(list(generator.samplers), value=request.sampler, label="Sampler", elem_id="sampler")
        cfg = gr.Slider(1, MAX_CFG, request.cfg, step=0.1, label="CFG (1 is off)", elem_id="cfg")
        negative = gr.Textbox(
            request.negative, label="Negative prompt", max_length=MAX_TEXT, visible=request.cfg > 1, elem_id="negative"
        )
    if page.examples:
        gr.Examples([[text] for text in page.examples], [prompt], label="Prompts", api_visibility="private")
    quiet = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    drawn = dice.click(lambda: random.randrange(_SEEDS), None, seed, **quiet)
    cfg.change(lambda value: gr.update(visible=value > 1), cfg, negative, **quiet)
    inputs = [prompt, w, compare, k, steps, cfg, negative, sampler, seed, *shares]
    moved = [slider.release for slider in (w, *shares)]
    return inputs, [button.click, prompt.submit, drawn.then, *moved]


def gradio_module() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the app needs gradio ({error}): {extras.install('app')}") from error
    return gradio


def launch(blocks: Any, host: str, port: int, wait: bool = True) -> str:
    """Serve the page; return its address.

    It serves until Ctrl-C if `wait`. On loopback the page answers to the names of this machine alone, so that no other
    site's can pass for it. Raises OSError for a port that is taken.
    """
    gr = gradio_module()
    from starlette.middleware import Middleware

    from rewards.server.callers import SameSite
    from rewards.server.wire import is_loopback

    system = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # names alone, so that nothing is fetched
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
        max_file_size=1,  # bytes; nothing here takes files, but gradio would
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css=(TEMPLATES / "app.css.template").read_text(encoding="utf-8"),
        app_kwargs={
            **dict.fromkeys(("docs_url", "redoc_url", "openapi_url")),
            "middleware": [Middleware(SameSite, local=is_loopback(host))],
        },
    )
    print(url, flush=True)
    if wait:
        blocks.block_thread()
    return url
