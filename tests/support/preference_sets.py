"""Small sets of preference pairs on disk, and batches of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from trainers.data.preference_formats import Pairs
from trainers.data.preference_pairs import Batches, PairBatch

SIDE = 8
Load = Callable[..., Pairs]


def picture(row: int, which: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """An image that says which row it is of (red), and whether it is that row's first or second (green)."""
    return Image.new("RGB", size, (row, 255 * which, 0))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def row(i: int, first_wins: bool = True, **changes: Any) -> dict[str, Any]:
    """A Pick-a-Pic row."""
    labels = {"label_0": float(first_wins), "label_1": float(not first_wins)}
    images = {"jpg_0": png(picture(i, 0)), "jpg_1": png(picture(i, 1))}
    return {"caption": f"caption {i}", **images, **labels, "ranking_id": i} | changes


def parquet(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
    return str(path)


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def batches(data: Pairs, batch_size: int = 4, **options: Any) -> Batches:
    return Batches(data, batch_size, SIDE, **options)


def same(a: PairBatch, b: PairBatch) -> bool:
    tensors = [name for name, value in vars(a).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    return a.captions == b.captions and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def drawn(data: Pairs, steps: Sequence[int], **options: Any) -> list[int]:
    return [i for step in steps for i in batches(data, **options).batch(step).indices_B.tolist()]


def shards(folder: Path, sizes: Sequence[int]) -> str:
    """A set of several files, the red of whose images counts through."""
    start = 0
    for shard, size in enumerate(sizes):
        parquet(folder / f"train-{shard:05d}.parquet", [row(start + i, i % 3 > 0) for i in range(size)])
        start += size
    return str(folder)
