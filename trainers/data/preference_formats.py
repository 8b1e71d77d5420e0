"""Rows of preference data: formats, checks, order and counts.

A format is known by its columns; further columns are ignored:

    Pick-a-Pic     caption, jpg_0, jpg_1 (bytes), label_0, label_1               label_0 = 1: jpg_0 wins
    HPDv2          prompt, image_path or file_path: [2], human_preference: [2]   [1, 0]: the first wins
    image folder   caption, chosen, rejected

A tie (labels 0.5/0.5) is dropped and counted. Paths are relative to the image root and must stay inside it. An
unusable row is counted by reason, and gives no pair. Captions, labels and paths are checked at once. Images are
checked at once where `verify` says so, and otherwise when their turn comes.

A set on disk is read in endless epochs. An epoch is a permutation of the kept rows that follows from (seed, epoch).
Streams have an order of their own (`trainers.data.preference_streams`).

Legend: N rows.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rlg.diffusion.sampling import SampleId

MAX_TRIES = 1000  # so many broken images in a row are no accident
MAX_PIXELS = 2**26  # pixels of an image, 200 MB as RGB: a file of a few kB may claim more
MAX_BYTES = 2**27  # bytes of an image's file
_TIE = "tie"
_CODECS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow knows others, some of which start programs


@dataclass(frozen=True)
class Pair:
    """Two images of one caption."""

    caption: str
    winner: Image.Image  # RGB, at its original size
    loser: Image.Image
    index: int  # the row in its set; for a stream of n shards, row * n + shard


@dataclass(frozen=True)
class Counts:
    """Counts of rows by their fate.

    Some broken images are found only during training. The process that meets one counts it.
    """

    rows: int  # rows that were read
    kept: int  # rows that may be trained on
    ties: int
    bad: Mapping[str, int]  # reason -> rows
    first: Mapping[str, str]  # reason -> the first such row

    def __str__(self) -> str:
        text = f"{self.rows} rows: {self.kept} kept, {self.ties} ties dropped, {sum(self.bad.values())} bad"
        reasons = [f"{count} x {reason}, first {self.first[reason]}" for reason, count in self.bad.items()]
        return f"{text} ({'; '.join(reasons)})" if reasons else text


class _Unusable(Exception):
    """Error of a row that is not trained on.

    Its argument is the reason.
    """


@dataclass
class Tally:
    """The count of rows while they are read."""

    rows: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def reject(self, reason: str, name: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
        self.first.setdefault(reason, name)

    def counts(self) -> Counts:
        bad = {reason: n for reason, n in self.rejected.items() if reason != _TIE}
        kept = self.rows - sum(self.rejected.values())
        return Counts(self.rows, kept, self.rejected.get(_TIE, 0), bad, {reason: self.first[reason] for reason in bad})


@dataclass(frozen=True)
class Format:
    """Names of a format's columns.

    Two values are in two columns, or in one that holds a list.
    """

    name: str
    caption: str
    images: tuple[str, ...]
    labels: tuple[str, ...]  # none: the first image wins
    paths: bool  # images are paths rather than bytes

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return [self.caption, *self.images, *self.labels]

    @property
    def light(self) -> list[str]:
        """Names of the columns that are cheap to read."""
        return [c for c in self.columns if self.paths or c not in self.images]

    def first_wins(self, row: Mapping[str, Any]) -> bool:
        """Check caption, labels and paths; tell whether the first image wins.

        Raises _Unusable, also for a tie.
        """
        caption = row.get(self.caption)
        if not isinstance(caption, str):
            raise _Unusable(f"no {self.caption}" if caption is None else f"{self.caption} is not text")
        if not caption.strip():
            raise _Unusable(f"empty {self.caption}")
        if self.paths:
            for path in _two_values(row, self.images):
                _check_path(path)
        labels = _two_values(row, self.labels) if self.labels else (1, 0)
        if labels == (0.5, 0.5):
            raise _Unusable(_TIE)
        if labels not in ((1, 0), (0, 1)):
            raise _Unusable(f"{', '.join(self.labels)} not 1/0, 0/1 or 0.5/0.5")
        return labels == (1, 0)


FORMATS = (
    Format("Pick-a-Pic", "caption", ("jpg_0", "jpg_1"), ("label_0", "label_1"), paths=False),
    Format("HPDv2", "prompt", ("image_path",), ("human_preference",), paths=True),
    Format("HPDv2", "prompt", ("file_path",), ("human_preference",), paths=True),
    Format("image folder", "caption", ("chosen", "rejected"), (), paths=True),
)


def _two_values(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, Any]:
    values = [row.get(name) for name in columns]
    for name, value in zip(columns, values, strict=True):
        if value is None:
            raise _Unusable(f"no {name}")
    if len(columns) == 1:
        values = values[0]
        if not isinstance(values, (list, tuple)) or len(values) != 2:
            raise _Unusable(f"{columns[0]} does not hold two values")
    return tuple(values)


def _check_path(path: Any) -> None:
    if not isinstance(path, str) or not path.strip():
        raise _Unusable("no image path")
    pure = PureWindowsPath(path)  # it knows both kinds of separators, and drives
    if pure.anchor or ".." in pure.parts:
        raise _Unusable("path outside the image root")


def _file_bytes(path: str, root: Path) -> bytes:
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root.resolve()):  # a link may lead outside
            raise _Unusable("path outside the image root")
        if file.exists() and not file.is_file():  # reading a named pipe would wait for ever
            raise _Unusable("no such image file")
        if file.stat().st_size > MAX_BYTES:
            raise _Unusable(f"image file over {MAX_BYTES >> 20} MiB")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise _Unusable("no such image file") from error


def _cell_bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, Mapping) else value  # `datasets.Image` is {bytes, path}
    if not isinstance(data, bytes) or not data:
        raise _Unusable("image without bytes")
    return data


def decode(data: bytes) -> Image.Image:
    """An RGB image from the bytes of a file.

    The file is a JPEG, PNG, WEBP, GIF or BMP. Raises _Unusable if the row is bad.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_CODECS)
        if not 0 < image.width * image.height <= MAX_PIXELS:  # Pillow only warns of up to twice its own limit
            raise _Unusable(f"image without pixels or of over {MAX_PIXELS >> 20} Mi")
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise _Unusable(f"image without pixels or of over {MAX_PIXELS >> 20} Mi") from error
    except _Unusable:
        raise
    except Exception as error:  # Pillow's decoders raise any type for broken bytes
        raise _Unusable("image cannot be decoded") from error


@dataclass(frozen=True)
class Row:
    """A row with a checked caption, labels and paths."""

    values: Mapping[str, Any]
    index: int
    name: str  # name in messages


@dataclass(frozen=True)
class Bookmark:
    """Place of a process's stream from which reading can go on.

    It lies between two segments of a shard, where the order of the rest is known.
    """

    position: int  # position of the first row after it
    epoch: int
    place: int  # place of the shard in the epoch's order of this process's shards
    row: int  # row of the shard where reading begins


class Pairs:
    """Base of `MapPairs` and `StreamPairs`: the kept rows of a set."""

    divided = False  # set if its positions are those of this process's share

    def __init__(self, form: Format, root: Path | None):
        self._form, self._root = form, root
        self._tally = Tally()
        self._broken: set[int] = set()  # rows with a broken image, each counted once

    @property
    def counts(self) -> Counts:
        """The counts so far.

        A stream counts the rows of its first epoch as it reads them.
        """
        return self._tally.counts()

    def rows(self, seed: int, start: int) -> Iterator[Row]:
        """Yield rows from position `start` on, without end."""
        raise NotImplementedError

    def bookmark(self, position: int) -> Bookmark | None:
        """A place from which reading up to a position is quick.

        It is None where every position is quick to read.
        """
        return None

    def restore(self, seed: int, mark: Bookmark) -> None:
        """Begin the next reading at a bookmark."""

    def pair(self, row: Row) -> Pair | None:
        """Read a row's images.

        If one is missing or broken, count the row and return None.
        """
        try:
            first_wins = self._form.first_wins(row.values)
            images = [self._image(value) for value in _two_values(row.values, self._form.images)]
        except _Unusable as why:
            if row.index not in self._broken:
                self._broken.add(row.index)
                self._tally.reject(str(why), row.name)
            return None
        winner, loser = images if first_wins else images[::-1]
        return Pair(row.values[self._form.caption], winner, loser, row.index)

    def _image(self, value: Any) -> Image.Image:
        return decode(_file_bytes(value, self._root) if self._root else _cell_bytes(value))

    def _accept(self, values: Mapping[str, Any], name: str, tally: Tally) -> bool:
        tally.rows += 1
        try:
            self._form.first_wins(values)
        except _Unusable as why:
            tally.reject(str(why), name)
            return False
        return True

    def _none_usable(self) -> ValueError:
        return ValueError(f"the preference data has not a single usable pair: {self.counts}")


class MapPairs(Pairs):
    """A set on disk.

    Raises ValueError if it has no usable pair.
    """

    def __init__(self, dataset: datasets.Dataset, form: Format, root: Path | None, verify: bool):
        super().__init__(form, root)
        self._dataset = dataset
        kept = self._drop_broken(self._scan(), verify)
        if not kept:
            raise self._none_usable()
        self._kept_N = torch.tensor(kept)
        self._order: tuple[int, int, Tensor] | None = None  # (seed, epoch, permutation)

    def __len__(self) -> int:
        """Number of rows of an epoch."""
        return len(self._kept_N)

    def rows(self, seed: int, start: int) -> Iterator[Row]:
        """Yield rows from global position `start` on, without end.

        An epoch is a permutation of all rows.
        """
        for position in itertools.count(start):
            epoch, place = divmod(position, len(self))
            yield self._row(int(self._kept_N[self._permutation(seed, epoch)[place]]))

    def _row(self, index: int) -> Row:
        return Row(self._dataset[index], index, f"row {index}")

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        if self._order is None or self._order[:2] != (seed, epoch):
            generator = SampleId(seed, epoch, 0).generator("order of pairs")
            self._order = (seed, epoch, torch.randperm(len(self), generator=generator))
        return self._order[2]

    def _scan(self) -> list[int]:
        chunks = self._dataset.select_columns(self._form.light).iter(batch_size=1000)  # faster than row by row
        rows = (
            dict(zip(chunk, cells, strict=True)) for chunk in chunks for cells in zip(*chunk.values(), strict=True)
        )
        return [index for index, row in enumerate(rows) if self._accept(row, f"row {index}", self._tally)]

    def _drop_broken(self, indices: list[int], verify: bool) -> list[int]:
        """Drop rows of broken images.

        Drop all of them, or those before the first good one.
        """
        bar = tqdm(indices, desc="check images", unit="pair", disable=None if verify else True, mininterval=1)
        good = []
        for place, index in enumerate(bar):
            if self.pair(self._row(index)) is not None:
                good.append(index)
                if not verify:
                    return good + indices[place + 1 :]
        return good
