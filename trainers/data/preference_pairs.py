"""Preference pairs for Diffusion-DPO, in batches by step, read through `datasets`.

Formats, and reasons that make a row unusable, are in `trainers.data.preference_formats`. The next good row takes the
place of a row with a broken image. So a batch depends on (seed, step) alone, whichever process finds the broken image.

Global batch s holds positions [s G, (s + 1) G) of an endless sequence of epochs. It has a part of equal size for each
process, in the order of ranks. If the data is a stream, each process reads a share of its own, so that the order
depends on the number of processes. A checkpoint keeps the place of each process; a resume reads again all rows after
the last bookmark.

Legend: G pairs of a step, over all processes; B pairs of one process.
"""

from __future__ import annotations

import json
import textwrap
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlg.diffusion.sampling import SampleId
from rlg.io.parsing import check_nesting, check_type, read_json
from trainers.data.preference_formats import FORMATS, MAX_TRIES, Bookmark, Counts, Format, MapPairs, Pair, Pairs
from trainers.data.preference_streams import StreamPairs

__all__ = ["Batches", "Counts", "Pair", "PairBatch", "Pairs", "crop_geometry", "load"]

VERIFY_ROWS = 4096  # all images of a set up to this size are decoded when it is loaded, unless told otherwise
_SUFFIXES = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_PLACE = "stream-{}.json"  # file of a process's place, in a checkpoint
_READ_AHEAD = 2  # batches that `Batches.iterate` prepares during training on one


@dataclass(frozen=True)
class PairBatch:
    """One process's part of a global batch of pairs."""

    captions: list[str]
    winners_B3HW: Tensor  # float in [0, 1], square
    losers_B3HW: Tensor
    indices_B: Tensor  # Pair.index, int64: a key for caches
    sizes_B2: Tensor  # (height, width) of the winners before resizing, int64
    crops_B2: Tensor  # (top, left) of the winners' crops after resizing, int64
    loser_sizes_B2: Tensor  # the same of the losers, which may have another size
    loser_crops_B2: Tensor

    def __len__(self) -> int:
        return len(self.captions)


def load(
    source: str,
    split: str = "train",
    streaming: bool = False,
    *,
    image_root: str | Path | None = None,
    verify: bool | None = None,
    buffer_size: int = 1000,
    cache_dir: str | Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> Pairs:
    """Load preference pairs of a hub id, a file or a folder.

    A file is a .parquet, .json or .jsonl. A folder was saved by `datasets`, or holds SPLIT.parquet (or
    SPLIT-*.parquet, also in data/), SPLIT.jsonl, SPLIT.json, or a single .jsonl of any name. image_root: where
    relative paths start (default: the file's folder). verify: decode every image now (default: for up to VERIFY_ROWS
    rows). buffer_size: rows among which a stream is shuffled. cache_dir: of `datasets`. rank, world: process whose
    share of a stream is read.

    Raises ValueError for a source that cannot be read, columns of no known format, or not a single usable pair.
    """
    if streaming and verify:
        raise ValueError("verify reads every image, which a stream is too large for; give one of the two")
    with _reading(source, split):
        dataset, root = _open(source, split, streaming, cache_dir)
        form = _format_of(dataset.column_names or list(next(iter(dataset), {})))
        dataset = _undecoded(dataset.select_columns(form.columns))
    root = _image_root(form, image_root or root)
    if image_root and not form.paths:
        warnings.warn(f"image_root is ignored: {form.name} data holds its images", stacklevel=2)
    if streaming:
        return StreamPairs(dataset, form, root, buffer_size, rank, world)
    return MapPairs(dataset, form, root, len(dataset) <= VERIFY_ROWS if verify is None else verify)


@contextmanager
def _reading(source: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets, the hub and pyarrow raise any type
        reason = textwrap.shorten(str(error.__cause__ or error), 400)
        raise ValueError(f"cannot read preference data {source!r}, split {split!r}: {reason}") from error


def _open(source: str, split: str, streaming: bool, cache_dir: str | Path | None) -> tuple[Any, Path | None]:
    """Open a source.

    Returns (dataset, folder from which relative paths start; None for the hub).
    """
    path = Path(source).expanduser()
    options = {"split": split, "streaming": streaming, "cache_dir": None if cache_dir is None else str(cache_dir)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split, streaming), path
    if path.exists():
        name = split.partition("[")[0]  # train[:100] is a part of train
        files = _files(path, name)
        kind = _SUFFIXES[files[0].suffix]
        for file in files if kind == "json" else ():
            check_nesting(file)
        root = path if path.is_dir() else path.parent
        return datasets.load_dataset(kind, data_files={name: [str(f) for f in files]}, **options), root
    if source.count("/") != 1 or source.startswith(("/", ".", "~")):
        raise ValueError("it is neither a file, a folder nor a hub id (NAME/SET)")
    return datasets.load_dataset(source, **options), None


def _saved(path: Path, split: str, streaming: bool) -> Any:
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"it has the splits {', '.join(saved)}")
        saved = saved[split]
    saved = saved.with_format(None)  # it may have been saved to come out as tensors
    return saved.to_iterable_dataset() if streaming else saved


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"its name ends in none of {', '.join(_SUFFIXES)}")
        return [path]
    names = ("{}.parquet", "{}-*.parquet", "data/{}.parquet", "data/{}-*.parquet", "{}.jsonl", "{}.json")
    for name in names:
        if found := sorted(path.glob(name.format(split))):
            return found
    lines = sorted(path.glob("*.jsonl"))
    if len(lines) != 1:
        wanted = ", ".join(name.format(split) for name in names)
        raise ValueError(f"the folder holds none of {wanted}, nor a single .jsonl file")
    return lines


def _format_of(columns: Sequence[str]) -> Format:
    for form in FORMATS:
        if set(form.columns) <= set(columns):
            return form
    known = "; ".join(f"{form.name}: {', '.join(form.columns)}" for form in FORMATS)
    raise ValueError(f"no known format has the columns {', '.join(columns) or '(none)'} ({known})")


def _undecoded(dataset: Any) -> Any:
    """Make image columns come as bytes.

    `datasets` would otherwise fail at the first broken image.
    """
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _image_root(form: Format, root: str | Path | None) -> Path | None:
    if not form.paths:
        return None
    if root is None:
        raise ValueError(f"{form.name} data names image files: give image_root, the folder that they are in")
    if not Path(root).is_dir():
        raise ValueError(f"no such folder of images: {root}")
    return Path(root)


def crop_geometry(size: tuple[int, int], resolution: int, place: tuple[float, float] = (0.5, 0.5)) -> tuple[int, int]:
    """(top, left) of a square crop of a resized image.

    The image's shorter side becomes `resolution` before.

    size: (height, width) of the image. place: (down, right) in [0, 1). 0.5 is the centre; uniform numbers make every
    offset equally likely.
    """
    rooms = [round(side * resolution / min(size)) - resolution for side in size]
    top, left = (min(int(u * (room + 1)), room) for u, room in zip(place, rooms, strict=True))
    return top, left


def pixels(image: Image.Image, resolution: int, crop: tuple[int, int]) -> Tensor:
    """(3, resolution, resolution) in [0, 1]: the crop of an RGB image.

    `crop_geometry` says which crop. Only the crop is resized, so that an absurdly long image costs no memory.
    """
    side = min(image.size)
    top, left = (offset * side / resolution for offset in crop)
    top, left = min(top, image.height - side), min(left, image.width - side)  # the resized size was rounded
    box = (left, top, left + side, top + side)
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Batches:
    """Batches of pairs, each a function of (seed, step).

    Raises ValueError for sizes that do not fit.
    """

    data: Pairs
    batch_size: int  # pairs a step, over all processes
    resolution: int  # side of the images in pixels
    seed: int = 0
    random_crop: bool = False  # the same relative place for both images of a pair; never flipped
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.resolution < 1:
            raise ValueError(f"batch_size {self.batch_size} and resolution {self.resolution} must be positive")
        if self.batch_size % self.world:
            raise ValueError(f"a batch of {self.batch_size} pairs is not divisible by {self.world} processes")

    def batch(self, step: int) -> PairBatch:
        """This process's pairs of global batch `step` (0, 1, ...)."""
        pairs = self.pairs(step)
        places = [self._place(self._start(step) + i) for i in range(len(pairs))]
        winners = [self._prepare(pair.winner, place) for pair, place in zip(pairs, places, strict=True)]
        losers = [self._prepare(pair.loser, place) for pair, place in zip(pairs, places, strict=True)]
        winners_B3HW, sizes_B2, crops_B2 = (torch.stack(column) for column in zip(*winners, strict=True))
        losers_B3HW, loser_sizes_B2, loser_crops_B2 = (torch.stack(column) for column in zip(*losers, strict=True))
        return PairBatch(
            captions=[pair.caption for pair in pairs],
            winners_B3HW=winners_B3HW,
            losers_B3HW=losers_B3HW,
            indices_B=torch.tensor([pair.index for pair in pairs]),
            sizes_B2=sizes_B2,
            crops_B2=crops_B2,
            loser_sizes_B2=loser_sizes_B2,
            loser_crops_B2=loser_crops_B2,
        )

    def iterate(self, first: int, stop: int) -> Iterator[PairBatch]:
        """Yield batches first, ..., stop - 1, prepared in the background."""
        with ThreadPoolExecutor(max_workers=1) as pool:  # one worker, because a stream is read in order
            waiting = deque(pool.submit(self.batch, step) for step in range(first, min(first + _READ_AHEAD, stop)))
            for step in range(first, stop):
                batch = waiting.popleft().result()
                if step + _READ_AHEAD < stop:
                    waiting.append(pool.submit(self.batch, step + _READ_AHEAD))
                yield batch

    def pairs(self, step: int) -> list[Pair]:
        """The pairs of `batch`, before cropping.

        The next good pair takes the place of a broken one.
        """
        rows = self.data.rows(self.seed, self.position(step))
        read: list[Pair | None] = []
        result = []
        for i in range(self.batch_size // self.world):
            for j in range(i, i + MAX_TRIES):
                if j == len(read):
                    read.append(self.data.pair(next(rows)))
                if read[j] is not None:
                    result.append(read[j])
                    break
            else:
                raise ValueError(f"{MAX_TRIES} pairs in a row cannot be read: {self.data.counts}")
        return result

    def position(self, step: int) -> int:
        """Position in the data where this process's part of a batch begins."""
        return step * (self.batch_size // self.world) if self.data.divided else self._start(step)

    def _start(self, step: int) -> int:
        return step * self.batch_size + self.rank * (self.batch_size // self.world)

    def _place(self, position: int) -> tuple[float, float]:
        if not self.random_crop:
            return 0.5, 0.5
        down, right = torch.rand(2, generator=SampleId(self.seed, position, 0).generator("crop")).tolist()
        return down, right

    def save_place(self, step: int, folder: Path) -> None:
        """Write the place of a stream before batch `step`.

        A set on disk has nothing to write.
        """
        mark = self.data.bookmark(self.position(step))
        if mark is not None:
            row = asdict(mark) | {"world": self.world}
            (folder / _PLACE.format(self.rank)).write_text(json.dumps(row))

    def load_place(self, step: int, folder: Path) -> None:
        """Read on from the place that `save_place` wrote.

        Without a file, a stream is read from its beginning. With another number of processes each has another share,
        and begins it at the next epoch. Raises ValueError for a file of something else.
        """
        file = next((f for f in (folder / _PLACE.format(r) for r in (self.rank, 0)) if f.is_file()), None)
        if file is None or not self.data.divided:
            return
        row = read_json(file)
        for name in ("world", "position", "epoch", "place", "row"):
            check_type(f"{file}: {name}", row.get(name), int)
        mark = Bookmark(*(row[name] for name in ("position", "epoch", "place", "row")))
        if row["world"] != self.world:
            mark = Bookmark(self.position(step), mark.epoch + 1, 0, 0)
        self.data.restore(self.seed, mark)

    def _prepare(self, image: Image.Image, place: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
        size = (image.height, image.width)
        crop = crop_geometry(size, self.resolution, place)
        return pixels(image, self.resolution, crop), torch.tensor(size), torch.tensor(crop)
