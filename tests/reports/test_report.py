"""The report of an evaluation: numbers by hand, hostile text, and the page in a browser."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlg.report import main
from rlg.reports.evaluation_data import read_run
from rlg.reports.evaluation_page import MAX_SIDE, read_tiles, write_joint_report, write_report
from tests.conftest import requests_of
from tests.support.page_width import assert_fits, opened

HOSTILE = "</script><script>document.title='owned'</script><img src=http://evil.test/x onerror=alert(1)> \"a\" & 'b'"
META = {
    "base": "models/tiny",
    "adapter": "runs/tiny/checkpoint-1",
    "name": "tiny",
    "trained_rewards": ["fit"],
    "steps": 4,
    "cfg": 1.0,
    "sampler": "sde",
    "level": 0.7,
    "seed": 0,
    "k": 2,
    "dtype": "float32",
    "created": "2025-01-01T00:00:00+00:00",
    "command": "python -m rlg.evaluate",
}
# WebDriver's codes; selenium is only imported where there is a browser
ARROW_LEFT, ARROW_RIGHT, HOME = "\ue012", "\ue014", "\ue011"
SCALES = (0.0, 0.5, 1.0, 2.0)
FIT = {0.0: 0.0, 0.5: 0.25, 1.0: 0.5, 2.0: 1.5}  # mean reward of a scale


def score_lines(held_out: str = "held", kl: bool = True) -> list[dict]:
    """Three prompts with two images each; image (p, k) is 0.1 p + 0.01 k above its scale's mean."""
    jobs = [("rlg", w) for w in SCALES] + [("lora_scale", 2.0), ("tuned_2x_steps", 1.0)]
    return [
        {
            "prompt_id": p,
            "prompt": HOSTILE if p == 1 else f"prompt {p}",
            "tag": "colour" if p else None,
            "k": k,
            "seed": 0,
            "w": w,
            "sampler": "sde" if kl else "ode",
            "method": mode,
            "rewards": {held_out: 7 - w, "fit": FIT[w] * (0.5 if mode == "lora_scale" else 1) + 0.1 * p + 0.01 * k},
            "kl": 3 * w**2 if kl else None,
            "diversity": 0.5 - 0.1 * w,
            "nfe": 8 if mode == "lora_scale" else 16,
            "seconds": 0.25,
        }
        for mode, w in jobs
        for p in range(3)
        for k in range(2)
    ]


def write_evaluation(folder: Path, lines: list[dict] | None = None, images: bool = True, **meta) -> Path:
    folder.mkdir(parents=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines or score_lines()))
    (folder / "meta.json").write_text(json.dumps(META | meta))
    if images:
        (folder / "images").mkdir()
        for i, w in enumerate(SCALES):
            for p in range(2):
                Image.new("RGB", (8, 8), (60 * i, 100 * p, 90)).save(folder / "images" / f"{p}-0-{w:g}.png")
    return folder


@pytest.fixture
def evaluation(tmp_path) -> Path:
    return write_evaluation(tmp_path / "eval")


def points_of(folder: Path) -> dict[tuple[str, float], dict]:
    return {
        (point["method"], point["w"]): point for point in json.loads((folder / "summary.json").read_text())["points"]
    }


def test_summary_by_hand(evaluation):
    assert write_report(evaluation) == evaluation / "report.html"
    summary = json.loads((evaluation / "summary.json").read_text())
    assert summary["meta"] == META
    assert (summary["base"], summary["adapter"]) == (META["base"], META["adapter"])
    assert [(point["method"], point["w"]) for point in summary["points"]] == [
        ("lora_scale", 2),
        *(("rlg", w) for w in SCALES),
        ("tuned_2x_steps", 1),
    ]
    point = points_of(evaluation)["rlg", 2.0]
    assert {key: point[key] for key in ("n", "nfe_per_image", "seconds_per_image", "kl", "kl_ci95")} == {
        "n": 6,
        "nfe_per_image": 16,
        "seconds_per_image": 0.25,
        "kl": 12,
        "kl_ci95": [12, 12],
    }
    assert point["diversity"] == pytest.approx(0.3)
    assert point["diversity_ci95"] == pytest.approx([0.3, 0.3])


def test_reward_fields_by_hand(evaluation):
    write_report(evaluation)
    points = points_of(evaluation)
    fit = points["rlg", 2.0]["rewards"]["fit"]
    assert fit["mean"] == pytest.approx(1.5 + 0.1 + 0.005)
    reach = 4.302653 * 0.1 / 3**0.5  # t of 2 degrees of freedom; prompts are 0.1 apart
    assert fit["ci95"] == pytest.approx([1.605 - reach, 1.605 + reach])
    assert (fit["delta_vs_tuned"], fit["delta_vs_base"]) == pytest.approx((1.0, 1.5))
    assert fit["delta_vs_tuned_ci95"] == pytest.approx([1.0, 1.0])  # paired: the prompts' differences cancel
    assert fit["win_vs_tuned"] == 1
    assert fit["win_vs_tuned_ci95"] == pytest.approx([0.025 ** (1 / 3), 1])  # three prompts won are no certainty
    held = points["rlg", 2.0]["rewards"]["held"]
    assert (held["win_vs_tuned"], held["win_vs_base"]) == (0, 0)
    assert points["rlg", 1.0]["rewards"]["fit"]["win_vs_tuned"] == 0.5
    assert points["lora_scale", 2.0]["rewards"]["fit"]["delta_vs_tuned"] == pytest.approx(0.25)
    assert points["tuned_2x_steps", 1.0]["rewards"]["fit"]["delta_vs_tuned"] == 0


def test_absent_references_and_measurements_are_null(tmp_path):
    lines = [line | {"diversity": None} for line in score_lines(kl=False) if line["w"] == 2]
    folder = write_evaluation(tmp_path / "eval", lines)
    page = write_report(folder).read_text()
    point = points_of(folder)["rlg", 2.0]
    assert [point[key] for key in ("kl", "kl_ci95", "diversity", "diversity_ci95")] == [None] * 4
    nulls = [key for key, value in point["rewards"]["fit"].items() if value is None]
    assert sorted(nulls) == sorted(
        f"{kind}_vs_{against}{ci}"
        for kind in ("win", "delta")
        for against in ("tuned", "base")
        for ci in ("", "_ci95")
    )
    assert "path KL to the base (nats)" not in page


def test_figures_are_written(evaluation):
    write_report(evaluation)
    with Image.open(evaluation / "curves.png") as image:
        assert image.size[0] > 1000
    svg = (evaluation / "curves.svg").read_text()
    for text in ("fit  (trained)", "held  (held out)", "fit  against KL", "diversity", "guidance weight w", "tuned"):
        assert text in svg


def test_same_input_same_output(evaluation, tmp_path):
    first, second = write_report(evaluation), write_report(evaluation, tmp_path / "again")
    assert first.read_bytes() == second.read_bytes()
    for name in ("summary.json", "curves.svg"):
        assert (evaluation / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_hostile_text_is_escaped(tmp_path):
    lines = score_lines(held_out="<b>held</b>$x$")
    page = write_report(write_evaluation(tmp_path / "eval", lines, name=HOSTILE, command=HOSTILE)).read_text()
    assert page.count("<script") == 1  # our own
    assert "&lt;/script&gt;&lt;script&gt;document.title" in page
    assert "<img src=http" not in page
    assert "<b>held" not in page
    assert "&lt;b&gt;held&lt;/b&gt;$x$" in page


def test_page_refers_to_nothing_outside(evaluation):
    page = write_report(evaluation).read_text().replace(HOSTILE, "")
    assert "default-src 'none'" in page
    for word in ('src="http', 'href="http', "url(http", "@import", "fetch(", '<link rel="stylesheet'):
        assert word not in page


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    lines = [line | {"prompt": "\ud83d"} for line in score_lines()]
    assert write_report(write_evaluation(tmp_path / "eval", lines)).is_file()


def test_tiles_hold_each_scale(evaluation):
    (evaluation / "images" / "1-0-2.png").unlink()
    tiles = read_tiles(read_run(evaluation))
    assert [tile.prompt for tile in tiles] == ["prompt 0", HOSTILE]
    assert [list(tile.frames) for tile in tiles] == [[0, 0.5, 1, 2], [0, 0.5, 1]]
    assert tiles[0].scores[2.0]["fit"] == 1.5
    assert "no image at w = 2" in write_report(evaluation).read_text()


def test_large_images_are_made_smaller(evaluation):
    Image.new("RGB", (3 * MAX_SIDE, MAX_SIDE)).save(evaluation / "images" / "0-0-1.png")
    frames = read_tiles(read_run(evaluation))[0].frames
    assert frames[1.0].startswith("data:image/webp;base64,")
    assert frames[2.0].startswith("data:image/png;base64,")


def test_no_images_no_grid(tmp_path):
    page = write_report(write_evaluation(tmp_path / "eval", images=False)).read_text()
    assert "Same prompts, same noises" not in page
    assert 'id="w"' in page  # the slider still moves through the numbers


def test_baselines_alone_make_a_page(tmp_path):
    lines = [line for line in score_lines() if line["method"] != "rlg"]
    assert 'id="w"' not in write_report(write_evaluation(tmp_path / "eval", lines)).read_text()


def test_joint_report(tmp_path):
    folders = [write_evaluation(tmp_path / name / "eval", name=name) for name in ("one", "two")]
    page = write_joint_report(folders)
    assert page == tmp_path / "one" / "report" / "report.html"
    assert sorted(json.loads((page.parent / "summary.json").read_text())["runs"]) == ["one", "two"]
    assert "two: guided (RLG)" in (page.parent / "curves.svg").read_text()
    assert '<th scope="row">two</th>' in page.read_text()
    assert not (folders[0] / "report.html").exists()


def test_joint_report_tells_namesakes_apart(tmp_path):
    folders = [write_evaluation(tmp_path / name / "eval") for name in ("one", "two")]
    page = write_joint_report(folders, tmp_path / "out")
    assert sorted(json.loads((page.parent / "summary.json").read_text())["runs"]) == [f"tiny ({f})" for f in folders]


def test_last_line_cut_off_is_tolerated(evaluation):
    scores = evaluation / "scores.jsonl"
    scores.write_text(scores.read_text()[:-40])
    with pytest.warns(UserWarning, match="cut off|no tuned partner|no base partner"):
        write_report(evaluation)
    assert points_of(evaluation)["tuned_2x_steps", 1.0]["n"] == 5


def test_command_line(evaluation, tmp_path):
    command = [sys.executable, "-m", "rlg.report", str(evaluation), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "out" / "report.html")


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def empty_scores(folder: Path) -> None:
    (folder / "scores.jsonl").write_text("")


def strip_meta(folder: Path) -> None:
    (folder / "meta.json").write_text('{"base": "b", "adapter": "a"}')


def misspell_trained(folder: Path) -> None:
    (folder / "meta.json").write_text(json.dumps(META | {"trained_rewards": "fit"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_folder, "scores.jsonl does not exist; `python -m rlg.evaluate` writes it"),
        (empty_scores, "scores.jsonl has no rows"),
        (strip_meta, "meta.json: missing trained_rewards"),
        (misspell_trained, "trained_rewards must be list[str], got 'fit'"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(evaluation, capsys, damage, message):
    damage(evaluation)
    with pytest.raises(SystemExit) as stop:
        main([str(evaluation)])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def shown(browser) -> dict[str, str]:
    """What a reader sees: the label, the first image, the mean rewards, the highlighted row, the cursors."""
    label = browser.find_element("id", "now").text
    visible = {
        name: [node for node in browser.find_elements("css selector", selector) if node.is_displayed()]
        for name, selector in {"image": ".tile:first-child img", "readout": ".readout"}.items()
    }
    assert [len(nodes) for nodes in visible.values()] == [1, 1]
    cursors = browser.find_elements("css selector", "[id^=cursor-].on")
    return {
        "label": label,
        "image": visible["image"][0].get_attribute("src"),
        "readout": visible["readout"][0].text,
        "row": browser.find_element("css selector", "tr.on .w").text,
        "cursors": " ".join(node.get_attribute("id") for node in cursors),
        "announced": browser.find_element("id", "w").get_attribute("aria-valuetext"),
    }


@pytest.mark.browser
def test_slider_in_a_browser(evaluation, browser):
    frames = read_tiles(read_run(evaluation))[0].frames
    page = write_report(evaluation).as_uri()
    browser.get(page)
    slider = browser.find_element("id", "w")
    before = shown(browser)
    assert (before["label"], before["row"], before["image"]) == ("w = 1", "1", frames[1.0])

    slider.send_keys(ARROW_RIGHT)
    after = shown(browser)
    assert (after["label"], after["row"], after["image"]) == ("w = 2", "2", frames[2.0])
    assert "fit 1.605" in after["readout"]
    assert "w = 2" in after["announced"]
    assert after["cursors"].split() == [f"cursor-{i}-2" for i in range(4)]

    for value, stop in ((0.7, 0.5), (0.2, 0.0), (1.6, 2.0)):  # dragged to between two stops: the nearest
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, value
        )
        assert shown(browser)["label"] == f"w = {stop:g}"
        assert shown(browser)["image"] == frames[stop]
    slider.send_keys(HOME)
    assert shown(browser)["label"] == "w = 0"
    browser.find_element("css selector", "[data-go='1']").click()
    assert shown(browser) == before

    assert browser.title == "tiny – RLG report"
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if not url.startswith("data:")] == [page]


@pytest.mark.browser
def test_nothing_scrolls_sideways_and_the_figure_stacks(tmp_path, browser):
    names = [f"reward_number_{n}" for n in range(3)]
    lines = [line | {"rewards": {name: -1234.5 * line["w"] for name in names}} for line in score_lines()]
    page = write_report(write_evaluation(tmp_path / "eval", lines, trained_rewards=["reward_number_0"]))
    assert_fits(browser, page, stacked=5)  # three rewards, one against KL, diversity


@pytest.mark.browser
def test_the_cursor_is_in_the_stacked_figure_too(evaluation, browser):
    """A panel looks otherwise at the next w, and as before when the slider is back."""
    opened(browser, write_report(evaluation), 390)
    panel = browser.find_element("css selector", ".stacked > svg")
    drawn = []
    for key in ("", ARROW_RIGHT, ARROW_LEFT):
        browser.find_element("id", "w").send_keys(key)
        browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", panel)
        drawn.append(np.asarray(Image.open(io.BytesIO(panel.screenshot_as_png)).convert("L"), dtype=float))
    moved, back = (int((abs(drawn[0] - later) > 100).sum()) for later in drawn[1:])  # pixels
    assert (moved > 10, back) == (True, 0)


@pytest.mark.browser
def test_hostile_name_in_a_browser(tmp_path, browser):
    lines = score_lines(held_out=HOSTILE)
    page = write_report(write_evaluation(tmp_path / "eval", lines, name=HOSTILE, base=HOSTILE)).as_uri()
    browser.get(page)
    assert browser.find_element("css selector", "h1").text == HOSTILE
    assert browser.title.startswith("</script><script>")
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if not url.startswith("data:")] == [page]


def many_prompts(lines: list[dict], held: Callable[[float], float]) -> list[dict]:
    """The same images four times over, as those of 12 prompts, with another held-out reward."""
    return [
        line | {"prompt_id": 3 * copy + line["prompt_id"], "rewards": line["rewards"] | {"held": held(line["w"])}}
        for copy in range(4)
        for line in lines
    ]


def test_the_page_marks_where_a_held_out_reward_falls(tmp_path):
    falling = write_evaluation(tmp_path / "falling", many_prompts(score_lines(), lambda w: 7 - w))
    page = write_report(falling).read_text(encoding="utf-8")
    assert "<b>held</b> falls from w = 0.5 on: -0.500" in page and "against w = 0</p>" in page
    assert "<b>fit</b> falls" not in page  # trained on
    assert " falls</text>" in (falling / "curves.svg").read_text()
    rising = write_evaluation(tmp_path / "rising", many_prompts(score_lines(), lambda w: w))
    assert "falls from" not in write_report(rising).read_text(encoding="utf-8").partition("<body")[2]


def weighed(cfg: float, folder: Path) -> str:
    """The page of images that keep their weights."""
    lines = [line | {"log_weight": line["k"] * line["w"]} for line in score_lines() if line["method"] == "rlg"]
    return write_report(write_evaluation(folder, lines, images=False, cfg=cfg)).read_text(encoding="utf-8")


def test_an_effective_share_is_a_bound_beside_the_heaviest_weight_and_k(tmp_path):
    """Two images of weights 1 and e^2 at w = 2: 63% effective, the heavier 88% of both."""
    page = weighed(1.0, tmp_path / "plain")
    assert "<b>≤ 63%</b> <small>heaviest 88% of K = 2</small>" in page
    assert "effective share, at most (K = 2, 4 steps)" in (tmp_path / "plain" / "curves.svg").read_text()
    assert "Weights are summed over 4 steps" in page and "heuristic" not in page
    assert "Under CFG the weights are heuristic" in weighed(3.0, tmp_path / "cfg")
    assert "heuristic under CFG)</text>" in (tmp_path / "cfg" / "curves.svg").read_text()


def test_the_best_w_is_reported_on_other_prompts(evaluation):
    """Chosen on prompts 0 and 2, reported on the two images of prompt 1: 1.5 + 0.1 + 0.005."""
    page = write_report(evaluation).read_text(encoding="utf-8")
    assert "<dt>best, w = 2</dt>" in page and '<dd class="best">1.605</dd>' in page
    assert "chosen on every other prompt, reported on the 2 images of the rest" in page


def test_a_method_has_one_colour_in_figure_and_table(evaluation):
    """The dots of the tables once knew fewer methods than the figures."""
    page = write_report(evaluation).read_text(encoding="utf-8")
    assert ".method.lora_scale { background: var(--c1); border-radius: 1px; }" in page
    assert ".method.corrected { background: var(--c4); }" in page
    assert ".method.expert { background: var(--ink); }" in page
