"""Hostile run folders, images, preference rows and reward servers: what is said, and what stays as it was.

The reward server's token, limits and address are in test_serve.py and test_remote.py, hostile text in a browser in
test_report.py.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from rewards import ServerError
from rewards.remote import ask
from rewards.server.client import MAX_ANSWER, Server
from rlg.evaluation.folder import prepare_folder
from rlg.io.folders import check_links
from rlg.io.optimizer_state import load_optimizer, save_optimizer
from rlg.reports import comparison_page, evaluation_data, evaluation_page
from rlg.runs.sweep_folder import SWEEP, read_sweep
from tests.support.hostile import at_most, said, watched
from trainers.checkpoints.checkpoint import read_state
from trainers.core.run_folder import check_folder
from trainers.data import preference_pairs
from trainers.grpo import GRPOConfig

HTML = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 191 }}<svg/onload=alert(3)>"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def evaluation(folder: Path, text: str = "a", **meta: Any) -> Path:
    folder.mkdir(parents=True)
    row = {"prompt": text, "tag": text, "seed": 0, "sampler": "ode", "method": "rlg", "nfe": 4, "seconds": 0.1}
    row |= {"rewards": {text: 1.0}, "kl": None, "diversity": None, "k": 0}
    rows = [row | {"prompt_id": p, "w": w} for p in range(2) for w in (0.0, 1.0)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps({"base": text, "adapter": text, "trained_rewards": [text]} | meta))
    (folder / "images").mkdir()
    for p, w in ((0, 0), (0, 1), (1, 0), (1, 1)):
        Image.new("RGB", (4, 4)).save(folder / "images" / f"{p}-0-{w}.png")
    return folder


# --- run folders


def test_hostile_text_stays_text_in_the_reports(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "run" / "eval" / "x", HTML, name=HTML, schedule=HTML, note={HTML: [HTML]})
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"reward": [HTML], "max_steps": 1, "beta": HTML}))
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, f"reward/{HTML}": 1.0, HTML: 2.0}) + "\n")
    for page, scripts in (
        (evaluation_page.write_report(folder), 1),
        (comparison_page.write_runs_report([tmp_path / "run"]), 0),
    ):
        html = page.read_text()
        assert html.count("<script") == scripts and "<img src=x" not in html and "<svg/" not in html
        assert "&lt;script&gt;alert(1)" in html and "1337" not in html and "{{ 7 * 191 }}" in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": ["x"]}, "base must be str, got ['x']"),
        ({"trained_rewards": [{}]}, "trained_rewards must be list[str], got [{}]"),
        ({"schedule": {}}, "schedule must be str, got {}"),
        ({"blend_scale": "x", "experts": ["a", "b"]}, "blend_scale must be float, got 'x'"),
        ({"blend_scale": 1.0, "experts": ["a"]}, "a blend has two experts"),
        ({"blend_scale": 1.0}, "a blend has two experts"),
    ],
)
def test_a_meta_of_wrong_types(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "x", **changes)
    answer = said(lambda: evaluation_page.write_report(folder), tmp_path)
    assert message in answer and str(folder / "meta.json") in answer


@pytest.mark.parametrize("name", ["report.html", "summary.json", "curves.svg", "curves.png"])
@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_a_report_is_not_written_through_a_link(name: str, there: bool, tmp_path: Path) -> None:
    folder, sentinel = evaluation(tmp_path / "theirs" / "x"), tmp_path / "home" / "profile"
    sentinel.parent.mkdir()
    if there:
        sentinel.write_text("mine")
    (folder / name).symlink_to(sentinel)
    answer = said(lambda: evaluation_page.write_report(folder), folder)
    assert f"{folder / name} is a link that leads out of its folder" in answer
    assert sentinel.exists() == there and (not there or sentinel.read_text() == "mine")
    evaluation_page.write_report(folder, tmp_path / "mine")  # the way out that the message names


def test_nothing_is_written_or_deleted_behind_a_link(tmp_path: Path) -> None:
    """By an evaluation that goes on or is overwritten, a report on runs, and training that goes on."""
    home, folder = tmp_path / "home", tmp_path / "theirs" / "run"
    home.mkdir()
    (home / "photo.png").write_text("mine")
    (home / "notes").write_text("mine")
    config = {"base": "tiny-sd3", "name": "run", "output_dir": str(folder.parent), "prompts": "p", "reward": ["r"]}
    calls: dict[str, Callable[[], Any]] = {
        "images": lambda: prepare_folder(folder, {}, overwrite=True),
        "scores.jsonl": lambda: prepare_folder(folder, {}, overwrite=False),
        "runs.csv": lambda: comparison_page.write_runs_report([folder], folder),
        "metrics.jsonl": lambda: check_folder(GRPOConfig(**config, resume=True)),
        "config.yaml": lambda: check_folder(GRPOConfig(**config, overwrite=True)),
    }
    for name, call in calls.items():
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
        (folder / "scores.jsonl").write_text("")
        if name == "runs.csv":
            (folder / "config.yaml").write_text("{}")
            (folder / "metrics.jsonl").write_text("")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(home / "notes" if name != "images" else home)
        assert f"{folder / name} is a link that leads out of its folder" in said(call, folder), name
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert {file.name: file.read_text() for file in home.iterdir()} == {"photo.png": "mine", "notes": "mine"}


def test_links_that_stay_inside_are_fine(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "latest").symlink_to("checkpoint-4")
    (tmp_path / "alias").symlink_to("run")
    check_links(tmp_path / "run")
    check_links(tmp_path / "alias")
    check_links(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(60_000, 60_000), "0-0-0.png is no image that can be shown"),
        (bomb(9_000, 9_000), "it has 9000 x 9000 pixels"),
        (bomb(0, 5), "0-0-0.png is no image that can be shown"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "0-0-0.png is no image that can be shown"),
        (b"", "0-0-0.png is no image that can be shown"),
    ],
)
def test_images_of_an_evaluation(content: bytes, message: str, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "x")
    (folder / "images" / "0-0-0.png").write_bytes(content)
    assert message in said(lambda: evaluation_page.write_report(folder), tmp_path)


def test_a_report_gives_no_image_from_elsewhere_away(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "x")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (5, 5), (1, 2, 3)).save(secret)
    (folder / "images" / "0-0-0.png").unlink()
    (folder / "images" / "0-0-0.png").symlink_to(secret)
    tiles = evaluation_page.read_tiles(evaluation_data.read_run(folder))
    assert [sorted(tile.frames) for tile in tiles] == [[1.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../x"}, "a run is named run-NUMBER, not '../../x'"),
        ({"name": "/tmp/x"}, "a run is named run-NUMBER, not '/tmp/x'"),
        ({"name": "run-0/../../x"}, "a run is named run-NUMBER"),
        ({"name": ["run-0"]}, "name must be str, got ['run-0']"),
        ({"status": "owned"}, "unknown status 'owned'"),
        ({"parameters": [1]}, "parameters must be dict, got [1]"),
        ({"metric": "1"}, "metric must be float | None, got '1'"),
        ({"evil": 1}, "unexpected keyword argument 'evil'"),
    ],
)
def test_a_sweep_that_leads_out_of_its_folder(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = {"name": "run-000", "parameters": {}} | changes
    (tmp_path / SWEEP).write_text(json.dumps({"config": {}, "seed": 0, "runs": [run]}))
    answer = said(lambda: read_sweep(tmp_path), tmp_path)
    assert f"{tmp_path / SWEEP} is no sweep's: " in answer and message in answer


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": "1"}, "step must be int, got '1'"),
        ({"step": -1}, "step must not be negative, got -1"),
        ({"step": 1, "counters": {"images": [1]}}, "images must be float, got [1]"),
        ({"step": 1, "ema_steps": 1e9}, "ema_steps must be int | None, got 1000000000.0"),
        ([], "must hold an object, got []"),
    ],
)
def test_a_state_that_no_trainer_wrote(row: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(row))
    answer = said(lambda: read_state(tmp_path), tmp_path)
    assert message in answer and str(tmp_path / "state.json") in answer


def test_an_optimizer_of_another_shape(tmp_path: Path) -> None:
    def adam(*shape: int) -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(torch.ones(shape))
        weight.grad = torch.ones(shape)
        optimizer = torch.optim.AdamW([weight])
        optimizer.step()
        return optimizer

    save_optimizer(adam(3, 2), tmp_path / "o.safetensors")
    load_optimizer(adam(3, 2), tmp_path / "o.safetensors")
    answer = said(lambda: load_optimizer(adam(2, 3), tmp_path / "o.safetensors"), tmp_path)
    assert "0.exp_avg has another shape than its parameter" in answer


# --- preference rows


def preferences(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "set").mkdir()
    Image.linear_gradient("L").save(folder / "set" / "a.png")
    fine = {"caption": "a", "chosen": "a.png", "rejected": "a.png"}
    (folder / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (fine, *rows)))
    return folder / "set"


def test_images_of_preference_rows_stay_inside_and_are_small(tmp_path: Path) -> None:
    names = ["/etc/hostname", "../secret.png", "..\\secret.png", "C:\\x.png", "link.png", "pipe.png", "huge.png"]
    names += ["large.png", "flat.png", "page.eps", "wide.png", "a.png\0", "x" * 5000, "."]
    folder = preferences(tmp_path, *({"caption": "a", "chosen": name, "rejected": "a.png"} for name in names))
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")  # to read it is to wait for a writer
    (folder / "huge.png").write_bytes(bomb(60_000, 60_000))
    (folder / "large.png").write_bytes(bomb(9_000, 9_000))  # Pillow alone would only warn
    (folder / "flat.png").write_bytes(bomb(0, 7))
    (folder / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    with (folder / "wide.png").open("wb") as file:
        file.truncate(2**36)  # takes no space
    with at_most(), watched(tmp_path):
        pairs = preference_pairs.load(str(folder), cache_dir=tmp_path / "cache")
    assert (pairs.counts.rows, pairs.counts.kept) == (len(names) + 1, 1)
    assert pairs.counts.bad == {
        "path outside the image root": 5,
        "no such image file": 4,
        "image without pixels or of over 64 Mi": 2,
        "image cannot be decoded": 2,
        "image file over 128 MiB": 1,
    }


def test_rows_of_deep_nesting_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"caption": ' + "[" * 10**5 + "]" * 10**5 + "}\n")
    answer = said(lambda: preference_pairs.load(str(tmp_path / "rows.jsonl"), cache_dir=tmp_path / "c"), tmp_path)
    assert answer.startswith("cannot read preference data")


# --- reward servers


def server(answer: httpx.Response) -> Server:
    return Server("http://far.example:1", sleep=lambda _: None, transport=httpx.MockTransport(lambda _: answer))


async def endless() -> Any:
    while True:
        yield b" " * 2**20


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: httpx.Response(200, content=endless()), "answered more than 16 MB"),
        (
            lambda: httpx.Response(
                200, headers={"content-encoding": "gzip"}, content=gzip.compress(bytes(40 * MAX_ANSWER), 1)
            ),
            "answered more than 16 MB",
        ),
        (lambda: httpx.Response(500, content=endless()), "answered more than 16 MB"),
        (lambda: httpx.Response(200, content=b"[" * 10**6), "answered something that is not JSON"),
        (lambda: httpx.Response(200, content=b'{"total": [' + b"9" * 400 + b"]}"), "as the score of image 0 of 1"),
        (lambda: httpx.Response(200, content=b'{"total": [NaN]}'), "returned nan as the score of image 0 of 1"),
        (lambda: httpx.Response(200, content=b'{"total": [1e999]}'), "returned inf as the score of image 0 of 1"),
        (lambda: httpx.Response(200, content=b'{"total": [1e39]}'), "returned 1e+39 as the score of image 0 of 1"),
        (
            lambda: httpx.Response(200, headers={"content-type": "text/x; charset=hex"}, content=b"zz"),
            "is not JSON: zz",
        ),
        (lambda: httpx.Response(403, content=b"\x1b[2J\x1b]0;owned\x07"), "answered 403: [2J ]0;owned"),
    ],
)
def test_answers_of_a_hostile_server(answer: Callable[[], httpx.Response], message: str, tmp_path: Path) -> None:
    far = server(answer())
    text = said(lambda: ask(far, torch.zeros(1, 3, 4, 4), ["a"], [{}]), tmp_path)
    assert text.startswith("http://far.example:1 ") and message in text and len(text) < 1000
    with pytest.raises(ServerError):
        ask(server(answer()), torch.zeros(1, 3, 4, 4), ["a"], [{}])
