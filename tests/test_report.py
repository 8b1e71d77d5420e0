"""The report of an evaluation: numbers by hand, hostile text, and the page in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import requests_of
from PIL import Image

from rlg.report import MAX_SIDE, main, read_run, read_tiles, write_joint_report, write_report

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
ARROW_RIGHT, HOME = "\ue014", "\ue011"  # WebDriver's codes; selenium is only imported where there is a browser
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
            "mode": mode,
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
        (point["mode"], point["w"]): point for point in json.loads((folder / "summary.json").read_text())["points"]
    }


def test_summary_by_hand(evaluation):
    assert write_report(evaluation) == evaluation / "report.html"
    summary = json.loads((evaluation / "summary.json").read_text())
    assert summary["meta"] == META
    assert (summary["base"], summary["adapter"]) == (META["base"], META["adapter"])
    assert [(point["mode"], point["w"]) for point in summary["points"]] == [
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
    assert fit["ci95"] == pytest.approx([1.505, 1.705])  # prompts 0, 0, 0 and 2, 2, 2 are drawn once in 27 each
    assert (fit["delta_vs_tuned"], fit["delta_vs_base"]) == pytest.approx((1.0, 1.5))
    assert fit["delta_vs_tuned_ci95"] == pytest.approx([1.0, 1.0])  # paired: the prompts' differences cancel
    assert (fit["win_vs_tuned"], fit["win_vs_tuned_ci95"]) == (1, [1, 1])
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
    lines = [line for line in score_lines() if line["mode"] != "rlg"]
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
def test_hostile_name_in_a_browser(tmp_path, browser):
    lines = score_lines(held_out=HOSTILE)
    page = write_report(write_evaluation(tmp_path / "eval", lines, name=HOSTILE, base=HOSTILE)).as_uri()
    browser.get(page)
    assert browser.find_element("css selector", "h1").text == HOSTILE
    assert browser.title.startswith("</script><script>")
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if not url.startswith("data:")] == [page]


def test_the_page_marks_where_a_held_out_reward_falls(evaluation, tmp_path):
    page = write_report(evaluation).read_text(encoding="utf-8")
    assert "<b>held</b> falls from w = 0.5 on: -0.500" in page and "against w = 0</p>" in page
    assert "<b>fit</b> falls" not in page  # trained on
    assert " falls</text>" in (evaluation / "curves.svg").read_text()
    lines = [line | {"rewards": line["rewards"] | {"held": line["w"]}} for line in score_lines()]
    rising = write_evaluation(tmp_path / "rising", lines)
    assert "falls" not in write_report(rising).read_text(encoding="utf-8").partition("<body")[2]
