"""A stream of preference pairs, read in shares and from bookmarks.

Each process reads a share of its own. An epoch takes its shards in an order that follows from (seed, epoch). Each
shard is cut into segments. A segment's rows leave a shuffle buffer in an order that follows from (seed, epoch, shard,
segment). So reading can go on in the same order from a bookmark between two segments.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch

from rlg.diffusion.sampling import SampleId
from trainers.data.preference_formats import MAX_TRIES, Bookmark, Format, Pairs, Row, Tally

# rows of a segment, as a multiple of the buffer: they are shuffled together, and a resume may read them again
_SEGMENT = 4


class StreamPairs(Pairs):
    """One process's share of a set that is read in order.

    Process r of n reads every n-th shard. Where there are fewer shards than processes, several read one, and keep
    every m-th row of it. Rows are shuffled within segments of a shard, so that reading can begin at each of them.
    Raises ValueError if the share has no usable pair.
    """

    divided = True

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        form: Format,
        root: Path | None,
        buffer_size: int,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(form, root)
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
        self._dataset, self._buffer_size = dataset, buffer_size
        self._own = list(range(rank, self._shards, world)) or [rank % self._shards]
        readers = [r for r in range(world) if r % self._shards == self._own[0]] if self._shards < world else [rank]
        self._stripe, self._stripes = readers.index(rank), len(readers)
        kept = (row for shard in self._own for row in self._usable(self._raw(shard, 0), shard, self._tally))
        if not any(self.pair(row) is not None for row in itertools.islice(kept, MAX_TRIES)):
            raise self._none_usable()
        self._seed: int | None = None  # None: nothing is being read; the counts are those of this first look
        self._start = 0
        self._seed_of_marks: int | None = None
        self._marks: list[Bookmark] = []  # in order

    def rows(self, seed: int, start: int) -> Iterator[Row]:
        """Yield rows from this process's position `start` on.

        To go back, it reads on from an earlier bookmark.
        """
        if seed != self._seed or start < self._start:
            self._restart(seed, start)
        while self._start < start:
            if self._ahead:
                self._ahead.popleft()
            else:
                next(self._endless)
            self._start += 1
        for place in itertools.count():
            if place == len(self._ahead):
                self._ahead.append(next(self._endless))
            yield self._ahead[place]

    def bookmark(self, position: int) -> Bookmark:
        """The last bookmark that is not after a position."""
        before = [mark for mark in self._marks if mark.position <= position]
        return before[-1] if before else Bookmark(0, 0, 0, 0)

    def restore(self, seed: int, mark: Bookmark) -> None:
        """Begin the next reading at a bookmark."""
        self._seed, self._marks = None, [mark]
        self._seed_of_marks = seed

    @property
    def _shards(self) -> int:
        return max(1, self._dataset.num_shards)

    def _restart(self, seed: int, start: int) -> None:
        self._tally, self._broken = Tally(), set()
        marks = self._marks if seed == self._seed_of_marks else []
        self._marks = [mark for mark in marks if mark.position <= start]
        first = self.bookmark(start)
        self._seed = self._seed_of_marks = seed
        self._start = first.position
        self._ahead: deque[Row] = deque()  # rows that were read, from position `start` on
        self._endless = self._from(seed, first)

    def _from(self, seed: int, first: Bookmark) -> Iterator[Row]:
        """Yield rows from a bookmark on, without end.

        It leaves a bookmark at every segment.
        """
        position, at, row = first.position, first.place, first.row
        for epoch in itertools.count(first.epoch):
            order = torch.randperm(len(self._own), generator=_generator(seed, epoch, "shards")).tolist()
            tally = self._tally if epoch == 0 else Tally()
            for place in range(at, len(order)):
                shard = self._own[order[place]]
                for begin, segment in self._segments(shard, row):
                    self._leave(Bookmark(position, epoch, place, begin))
                    usable = self._usable(segment, shard, tally)
                    for each in _shuffled(usable, self._buffer_size, _generator(seed, epoch, f"{shard}/{begin}")):
                        position += 1
                        yield each
                row = 0
            at = 0

    def _leave(self, mark: Bookmark) -> None:
        if not self._marks or mark.position > self._marks[-1].position:
            self._marks.append(mark)

    def _segments(self, shard: int, first: int) -> Iterator[tuple[int, Iterator[tuple[int, Mapping[str, Any]]]]]:
        """Yield (first row, rows) of each segment of a shard.

        It begins at row `first`.
        """
        size, raw = _SEGMENT * self._buffer_size, self._raw(shard, first)
        for head in raw:
            segment = itertools.chain([head], itertools.islice(raw, size - 1))
            yield head[0], segment
            for _ in segment:  # read on past rows that the caller left in the segment
                pass

    def _raw(self, shard: int, first: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield (number, values) of this process's rows of a shard.

        It begins at row `first`.
        """
        part = self._dataset if self._shards == 1 else self._dataset.shard(self._shards, shard)
        for row, values in enumerate(part.skip(first) if first else part, start=first):
            if row % self._stripes == self._stripe:
                yield row, values

    def _usable(self, raw: Iterable[tuple[int, Mapping[str, Any]]], shard: int, tally: Tally) -> Iterator[Row]:
        for row, values in raw:
            name = f"row {row}" + (f" of shard {shard}" if self._shards > 1 else "")
            if self._accept(values, name, tally):
                yield Row(values, row * self._shards + shard, name)


def _generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    return SampleId(seed, epoch, 0).generator(f"order of pairs: {purpose}")


def _shuffled(rows: Iterable[Row], size: int, generator: torch.Generator) -> Iterator[Row]:
    """Yield rows in a random order, by a buffer of `size`.

    A random row of the buffer gives way to each that comes.
    """
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < size:
            waiting.append(row)
            continue
        place = int(torch.randint(size, (1,), generator=generator))
        yield waiting[place]
        waiting[place] = row
    yield from (waiting[i] for i in torch.randperm(len(waiting), generator=generator).tolist())
