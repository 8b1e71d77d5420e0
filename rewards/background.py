"""Scoring while sampling, by rewards that mostly wait for a server.

`RewardSpec.waits` marks them. They are asked as soon as a batch of images is there. The other rewards score at the
end, in one call: in the background they would compete with sampling for the CPU or the GPU, and no time would be won.
A score depends on its own image alone, so results are the same, and there is nothing to set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from rewards import RewardMix, RewardScores


class DaemonExecutor(Executor):
    """A thread pool that nobody waits for.

    ThreadPoolExecutor joins its threads at exit, and a request takes minutes. At the end of a `with` block the threads
    end after the submitted jobs; the block does not wait for them.
    """

    def __init__(self, threads: int):
        self._jobs: SimpleQueue[tuple[Future, Callable, tuple, dict] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Run a function in a thread, as every executor does."""
        future: Future = Future()
        self._jobs.put((future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Let the threads end after the jobs submitted so far."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function, args, kwargs = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # it is raised for the caller, who asks for the result
                future.set_exception(error)


class EarlyScores:
    """The scores of one iteration's images.

    Call `add` with every sampled batch, and `finish` after the last.
    """

    def __init__(self, mix: RewardMix):
        self.mix = mix
        self._worker = DaemonExecutor(1) if mix.waits else None
        self._added: list[Future[dict[str, Tensor]]] = []

    def add(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Begin to score the next batch, by the rewards that wait.

        It returns at once.
        """
        if self._worker:  # move images to the CPU here, to keep the thread off the sampler's stream
            self._added.append(
                self._worker.submit(self.mix.parts, self.mix.waits, images_B3HW.cpu(), prompts, metadata)
            )

    def finish(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> RewardScores:
        """Scores of all batches that were added.

        The images are those of the batches, in order. Raises as the mix does.
        """
        if not self._worker:
            return self.mix(images_B3HW, prompts, metadata)
        self._worker.shutdown()
        local = [name for name in self.mix.names if name not in self.mix.waits]
        parts = self.mix.parts(local, images_B3HW, prompts, metadata)
        early = [future.result() for future in self._added]
        return self.mix.weigh(parts | {name: torch.cat([rows[name] for rows in early]) for name in self.mix.waits})
