"""Several trainings as one claim: what is pooled, by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rlg.pool import main, merged, pool
from rlg.reports.evaluation_data import read_run
from tests.reports.test_report import write_evaluation

POINTS = {("rlg", 0.0): 0.0, ("rlg", 1.0): 1.0, ("rlg", 2.0): 1.5, ("lora_scale", 2.0): 1.25}


def _lines(seed: int, slope: float) -> list[dict]:
    """Twelve prompts, two images each: `fit` is slope times POINTS above what the prompt and the image have."""
    return [
        {"prompt_id": p, "prompt": f"prompt {p}", "tag": None, "k": k, "seed": seed, "w": w, "sampler": "sde"}
        | {"method": mode, "rewards": {"fit": slope * value + p + 0.1 * k, "held": -w}}
        | {"kl": w, "diversity": 0.2, "nfe": 8, "seconds": 0.5}
        for (mode, w), value in POINTS.items()
        for p in range(12)
        for k in range(2)
    ]


def _evaluations(tmp_path: Path, **meta: object) -> list[Path]:
    return [
        write_evaluation(
            *(tmp_path / f"s{s}", _lines(s, slope), False),
            **{"name": f"s{s}", "seed": s, "digests": {"adapter": str(s), "base": "one"}, **meta},
        )
        for s, slope in ((0, 1.0), (1, 3.0))
    ]


def test_pooled_differences_by_hand(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in _evaluations(tmp_path)]
    summary = pool(runs, merged(runs))
    points = {(point["method"], point["w"]): point for point in summary["points"]}
    assert points["rlg", 1.0]["n"] == 48  # 2 trainings, 12 prompts, 2 images
    fit = points["rlg", 2.0]["rewards"]["fit"]
    assert fit["delta_vs_base"] == pytest.approx((1.5 + 4.5) / 2)
    assert fit["delta_vs_tuned"] == pytest.approx((0.5 + 1.5) / 2)
    # prompts do not differ in it, and the interval is over prompts
    assert fit["delta_vs_base_ci95"] == pytest.approx([3.0, 3.0])
    lora = {entry["reward"]: entry for entry in summary["guided_minus_lora"]}
    assert (lora["fit"]["w"], lora["fit"]["delta"]) == (2.0, pytest.approx((0.25 + 0.75) / 2))
    assert lora["fit"]["by_training"] == pytest.approx([0.25, 0.75])
    assert lora["held"]["delta"] == 0
    assert summary["best"]["fit"]["w"] == 2.0
    assert summary["best"]["fit"]["delta_vs_tuned"] == pytest.approx(1.0)
    assert summary["best"]["fit"]["n"] == 24  # chosen on six prompts, reported on the six others
    assert [row["seed"] for row in summary["trainings"]] == [0, 1]
    own = points["lora_scale", 2.0]["rewards"]["fit"]["by_training"]
    assert [training["delta_vs_base"] for training in own] == pytest.approx([1.25, 3.75])


def test_the_command_writes_both_files_without_paths(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = _evaluations(tmp_path, command=f"{tmp_path}/evaluate.py", base=f"{tmp_path}/model")
    main([*map(str, folders), "--output", str(tmp_path / "out"), "--title", "A claim", "--by", "bash a.sh"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "README.md")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("# A claim\n\n`bash a.sh`\n")
    assert "| guided (RLG) | 2 | 8.550 [" in text  # 2 * 1.5, and 5.5 + 0.05 of the prompts and images
    assert "+3.000 [3.000, 3.000] (+1.500, +4.500) | +1.000 [1.000, 1.000] (+0.500, +1.500) | 8 |" in text
    assert "| 2 | +0.500 [0.500, 0.500] (+0.250, +0.750) |" in text
    assert "Falls from w = 1 on (by training: 1, 1)." in text
    written = (tmp_path / "out" / "summary.json").read_text()
    assert json.loads(written)["settings"]["num_prompts"] is None
    assert str(tmp_path) not in text + written
    assert json.loads(written)["settings"]["base"] == "model"
    with Image.open(tmp_path / "out" / "curves.png") as curves:
        assert curves.width > curves.height > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": 3.0}, "s1 and .*s0 differ in cfg: those are two claims"),
        ({"digests": {"adapter": "1", "base": "other"}}, "differ in digests: those are two claims"),
        ({"name": "s0"}, "two of the evaluations have one name"),
    ],
)
def test_what_is_no_one_claim_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    folders = _evaluations(tmp_path)
    meta = json.loads((folders[1] / "meta.json").read_text())
    (folders[1] / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(ValueError, match=message):
        merged([read_run(folder) for folder in folders])


def test_one_noise_twice_is_refused(tmp_path: Path) -> None:
    folders = [
        write_evaluation(tmp_path / name, _lines(0, 1.0), images=False, name=name, seed=0) for name in ("a", "b")
    ]
    with pytest.raises(ValueError, match="start from the same noise"):
        merged([read_run(folder) for folder in folders])
