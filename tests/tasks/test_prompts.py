"""Prompt sources: their order, their metadata, and a clear refusal of what can't be read."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet
import pytest
import yaml

from rlg import prompts
from rlg.evaluation import options as evaluation_options
from rlg.prompts import Prompt
from rlg.tasks import prompt_sets


def test_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  two blue crosses  \r\na café\n", encoding="utf-8")
    assert prompt_sets.load(str(file)) == [Prompt("a red circle"), Prompt("two blue crosses"), Prompt("a café")]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_lines_keep_their_metadata(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"metadata.{suffix}"
    rows = [
        {"prompt": "a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]},
        {"prompt": "x"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second = prompt_sets.load(str(file))
    assert first == Prompt("a bench", {"tag": "single_object", "include": [{"class": "bench", "count": 1}]})
    assert second == Prompt("x", {})


def test_marks_and_separators_of_other_editors(tmp_path: Path) -> None:
    """A byte order mark is no part of a prompt, and a prompt may hold Unicode's line separator."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("\ufeff" + json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False), encoding="utf-8")
    assert prompt_sets.load(str(file)) == [Prompt("one\u2028two")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "{file} holds no prompts"),
        ("blank.txt", b"\n   \n\t\n", "{file} holds no prompts"),
        ("empty.jsonl", b"\n", "{file} holds no prompts"),
        ("latin.txt", "a caf\u00e9".encode("latin-1"), "{file} is not UTF-8 text"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "{file}:2: not JSON"),
        ("bad.jsonl", b'{"prompt": "a"}\n\n["b"]\n', "{file}:3: a row needs a text under `prompt`"),
        ("bad.jsonl", b'{"text": "a"}\n', "{file}:1: a row needs a text under `prompt`"),
        ("bad.jsonl", b'{"prompt": 3}\n', "{file}:1: a row needs a text under `prompt`"),
    ],
)
def test_unreadable_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message.format(file=file))):
        prompt_sets.load(str(file))


@pytest.mark.parametrize("source", ["nowhere.txt", "tests", ""])
def test_missing_files_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"no such prompt file: {source}"):
        prompt_sets.load(source)


@pytest.mark.parametrize("name", ["composition", "composition/val", "shapes/train", "", "text/", "all/test/x"])
def test_unknown_tinyworld_sets_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown prompt set tinyworld:{name}; known: composition, text or all"):
        prompt_sets.load(f"tinyworld:{name}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_tinyworld_sets(split: str) -> None:
    shapes, signs, both = (prompt_sets.load(f"tinyworld:{kind}/{split}") for kind in ("composition", "text", "all"))
    assert both == shapes + signs
    assert {p.metadata["tag"] for p in signs} == {"text"}
    assert len(signs) == len({p.text for p in signs}) == 256
    assert "text" not in {p.metadata["tag"] for p in shapes}
    assert prompt_sets.load(f"tinyworld:all/{split}") == both  # an index into a set names the same prompt in every run


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as on the hub: a parquet file for each split, in data/."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    captions = {"test_unique": ["a red circle", "  a caf\u00e9\n", "", "a red circle"], "train": ["a cross", "b", "c"]}
    (tmp_path / "pickapic" / "data").mkdir(parents=True)
    for split, texts in captions.items():
        table = datasets.Dataset.from_dict({"caption": texts, "label_0": [0.5] * len(texts)})
        table.to_parquet(tmp_path / "pickapic" / "data" / f"{split}-00000-of-00001-73a51cbb6488571d.parquet")
    return tmp_path / "pickapic"


def test_a_column_of_a_dataset(dataset: Path) -> None:
    texts = ["a red circle", "a caf\u00e9", "a red circle"]  # in their order, and repeated ones repeated
    assert prompt_sets.load(f"hub:{dataset}:test_unique:caption") == [Prompt(text) for text in texts]
    assert len(prompt_sets.load(f"hub:{dataset}:train:caption")) == 3


def test_a_hub_id_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"prompt": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompt_sets.load("hub:owner/set:test:prompt") == [Prompt("a")]
    assert asked == [("owner/set", "test")]


@pytest.mark.parametrize("source", ["hub:", "hub:owner/set", "hub:owner/set:test", "hub:owner/set::caption", "hub:::"])
def test_a_dataset_needs_its_split_and_column(source: str) -> None:
    with pytest.raises(ValueError, match="a prompt set of the hub is named hub:OWNER/NAME:SPLIT:COLUMN, got 'hub:"):
        prompt_sets.load(source)


def test_a_dataset_without_the_column_the_split_or_texts(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'prompt'; it has caption, label_0$"):
        prompt_sets.load(f"hub:{dataset}:train:prompt")
    with pytest.raises(ValueError, match=r"row 0 holds no text but 0\.5$"):
        prompt_sets.load(f"hub:{dataset}:train:label_0")
    with pytest.raises(ValueError, match=r"^cannot read the prompts hub:.*:val:caption \(.*\)$"):
        prompt_sets.load(f"hub:{dataset}:val:caption")


def test_a_dataset_that_is_not_here_is_said_in_one_line_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError) as caught:
        prompt_sets.load("hub:no-such-owner/set:test:caption")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert message.startswith("cannot read the prompts hub:no-such-owner/set:test:caption (")
    assert "`hf download --repo-type dataset no-such-owner/set --local-dir DIR` where there is a network" in message
    assert message.endswith("then hub:DIR:test:caption")


def test_spread_is_even_ordered_and_keeps_the_shares() -> None:
    rows = [Prompt(str(i), {"tag": tag}) for i, tag in enumerate(["a"] * 60 + ["b"] * 30 + ["c"] * 10)]
    for count in (1, 7, 10, 50, 99, 100):
        chosen = prompts.spread(rows, count)
        assert len(set(chosen)) == count
        assert chosen == sorted(chosen)
        assert all(0 <= i < 100 for i in chosen)
    assert Counter(rows[i].metadata["tag"] for i in prompts.spread(rows, 10)) == {"a": 6, "b": 3, "c": 1}


@pytest.mark.parametrize("count", [None, 5, 6, 1000])
def test_spread_of_all(count: int | None) -> None:
    assert prompts.spread([Prompt("x")] * 5, count) == [0, 1, 2, 3, 4]


ROWS = [
    {"caption": "a red circle, left of a cross", "tag": "position", "note": 'it says "stop"'},
    {"caption": "a caf\u00e9\nat night", "tag": "text", "note": ""},
]


def table(file: Path) -> Path:
    """ROWS in a file of the format that its suffix names, written by other code than reads it."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        pandas.DataFrame(ROWS).to_parquet(file)
    elif kind in (".csv", ".tsv"):
        pandas.DataFrame(ROWS).to_csv(file, index=False, sep="\t" if kind == ".tsv" else ",", encoding="utf-8-sig")
    else:
        pandas.DataFrame(ROWS).to_json(file, orient="records", lines=kind == ".jsonl")
    return file


@pytest.mark.parametrize("name", ["p.csv", "P.CSV", "p.tsv", "p.json", "p.jsonl", "p.parquet"])
def test_a_column_is_the_prompts_and_the_others_are_metadata(name: str, tmp_path: Path) -> None:
    source = str(table(tmp_path / name))
    expected = [Prompt(row["caption"], {"tag": row["tag"], "note": row["note"]}) for row in ROWS]
    assert prompt_sets.load(source, "caption") == expected
    with pytest.raises(
        ValueError, match=r"a row needs a text under `prompt`; it has caption, tag, note \(--prompt_col"
    ):
        prompt_sets.load(source)


def test_what_only_some_rows_of_a_parquet_file_have_and_images_are_left_out(tmp_path: Path) -> None:
    """GenEval's rows, beside an image as datasets store it: a table fills up with nulls what a row lacks."""
    include = [{"class": "bench", "count": 1}], [{"class": "cat", "count": 2, "color": "red"}]
    columns = {"prompt": ["a bench", "two cats"], "include": list(include), "tag": [None, "counting"]}
    columns |= {"image": [{"bytes": b"x", "path": "x.png"}] * 2, "jpg": [b"y", b"y"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    first, second = prompt_sets.load(str(tmp_path / "p.parquet"))
    assert first == Prompt("a bench", {"include": include[0]})
    assert second == Prompt("two cats", {"include": include[1], "tag": "counting"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"prompt,tag\na,b\nc\n", "{file}:3: 1 cells under 2 columns"),
        ("p.csv", b"prompt,prompt\na,b\n", "{file}: a column is named twice: prompt, prompt"),
        ("p.csv", b'prompt\n"a\n', "{file}:2: not a table"),
        ("p.csv", b"", "{file} holds no prompts"),
        ("p.csv", b"prompt\n", "{file} holds no prompts"),
        ("p.json", b"[]", "{file} holds no prompts"),
        ("p.json", b'[{"prompt": "a"}, "b"]', "{file}: row 2: a row needs a text under `prompt`, and is no object"),
        ("p.parquet", b"PAR1", "{file}: not a parquet file"),
        ("p.xlsx", b"a", "{file}: prompts are read from .txt, .csv, .tsv, .json, .jsonl, .parquet files"),
        ("p.yaml", b"a", "{file}: prompts are read from .txt, .csv"),
    ],
)
def test_tables_that_are_none_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    test_unreadable_files_are_refused(name, content, message, tmp_path)


def test_a_column_is_of_files_that_have_some(tmp_path: Path) -> None:
    file = str(table(tmp_path / "p.csv"))
    trained, held_out = prompt_sets.load_each([file, "tinyworld:composition/test"], "caption")
    assert (len(trained), held_out) == (2, prompt_sets.load("tinyworld:composition/test"))
    assert prompt_sets.load_each([None, file], "caption") == [[], trained]
    with pytest.raises(ValueError, match="--prompt_column caption does nothing: there are no columns in tinyworld:"):
        prompt_sets.load_each([None, "tinyworld:composition/test"], "caption")


def test_an_evaluation_takes_the_column_of_the_run_with_its_prompts(tmp_path: Path) -> None:
    def column(*options: str, **run: str) -> str | None:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
        return evaluation_options.completed(["--ckpt", str(tmp_path), *options]).prompt_column

    assert column(prompt_column="caption", eval_prompts="p.csv") == "caption"
    assert column("--prompt_column", "text", prompt_column="caption", eval_prompts="p.csv") == "text"
    assert column(prompt_column="caption", eval_prompts="tinyworld:text/test") is None  # it was the training prompts'
    assert column("--prompts", "other.csv", prompt_column="caption", eval_prompts="p.csv") is None
    assert column("--prompts", "other.csv", "--prompt_column", "text", eval_prompts="p.csv") == "text"
