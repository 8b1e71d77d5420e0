"""One call of one reward.

A reward is other people's code. It gets copies, because the next reward sees the same images. A call has a limit of
time. Every error of it, sys.exit included, is reported with the image that caused it.
"""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Reward(Protocol):
    """Protocol of a reward: scores of images, where higher is better.

    images_B3HW: float RGB in [0, 1], any device. prompts and metadata: one per image. Returns B scores, fp32 on CPU. A
    reward is deterministic, and a score depends on its own image, prompt and metadata alone. It may write into its
    arguments. It may raise ValueError for metadata that it cannot work with; if it knows so without an image, it is a
    `CheckedReward`.
    """

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor: ...


@dataclass(frozen=True)
class CheckedReward:
    """A reward that knows without an image which prompts it cannot score."""

    score: Reward
    require: Callable[[str, dict[str, Any]], Any]  # (prompt, its metadata); raises ValueError for one it cannot score
    model: str | None = None  # name of the model, where the table's line does not give it

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return self.score(images_B3HW, prompts, metadata)

    def check(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> dict[int, str]:
        """Reasons by the index of each prompt that it cannot score."""
        reasons = {}
        for index, (prompt, row) in enumerate(zip(prompts, metadata, strict=True)):
            try:
                self.require(prompt, row)
            except ValueError as error:
                reasons[index] = str(error)
        return reasons


@dataclass(frozen=True)
class DifferentiableReward:
    """A reward that also has a gradient; see `rewards.gradients`."""

    score: Reward
    # Same arguments as `score`. Returns B scores with a graph, of pixels that are not rounded to 256 levels.
    unrounded: Callable[[Tensor, Sequence[str], Sequence[dict[str, Any]]], Tensor]
    networks: tuple[nn.Module, ...] = ()  # its frozen models; gradients go through them in fp32

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return self.score(images_B3HW, prompts, metadata)


class RewardError(ValueError):
    """Failure of a reward.

    The message names the reward, the prompt and the index of the image in the batch.
    """


class ServerError(OSError):
    """Failure of a reward's server, whatever the image is.

    The message names the server and what it said.
    """


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a reward."""

    name: str
    reward: Reward
    images_B3HW: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    seconds: float = 0.0  # the limit of a call; 0: none

    def alone(self, index: int) -> Batch:
        """The batch of one of its images."""
        part = slice(index, index + 1)
        rows = {"prompts": self.prompts[part], "metadata": self.metadata[part]}
        return replace(self, images_B3HW=self.images_B3HW[part], **rows)


def place(index: int, prompts: Sequence[str]) -> str:
    """Words that identify an image."""
    return f"image {index} of {len(prompts)} (prompt {textwrap.shorten(prompts[index], 200)!r})"


def score(batch: Batch, lenient: bool = False) -> Tensor:
    """(B,) scores, fp32 on the CPU.

    Where the whole batch fails, each image is scored alone. lenient: images that fail again are NaN, unless all do.
    Raises RewardError, with the image, for other failures, a result of another shape, and a call that takes too long.
    """
    try:
        return _call(batch)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # a reward's model may raise anything
        return _one_by_one(batch, error, lenient)


def _one_by_one(batch: Batch, error: BaseException, lenient: bool) -> Tensor:
    import torch

    scores: list[Tensor] = []
    failed: dict[int, BaseException] = {}
    for i in range(len(batch.prompts)):
        try:
            scores.append(_call(batch.alone(i)))
        except RewardError:
            raise
        except (Exception, SystemExit) as alone:
            failed[i] = alone
            scores.append(torch.full((1,), torch.nan))
            if not lenient:
                break
    if not scores:
        raise RewardError(f"reward {batch.name!r} failed on no images at all: {_reason(error)}") from error
    if failed and (not lenient or 1 < len(failed) == len(scores)):
        index, cause = next(iter(failed.items()))
        where = place(index, batch.prompts)
        raise RewardError(f"reward {batch.name!r} failed on {where}: {_reason(cause)}") from cause
    if failed:
        where = place(next(iter(failed)), batch.prompts)
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        told = f"failed on {where}{others}, left out: {_reason(next(iter(failed.values())))}"
    else:
        told = f"failed on {len(scores)} images at once, and on none of them alone: {_reason(error)}"
    warnings.warn(f"reward {batch.name!r} {told}", stacklevel=5)
    return torch.cat(scores)


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _call(batch: Batch) -> Tensor:
    """Call the reward with copies of its arguments.

    Raises what the reward raises.
    """
    from torch import Tensor

    images, metadata = batch.images_B3HW.clone(), copy.deepcopy(batch.metadata)
    try:
        scores_B = _within(batch, lambda: batch.reward(images, list(batch.prompts), metadata))
    except ServerError as error:
        raise RewardError(f"reward {batch.name!r}: {error}") from error
    count = len(batch.prompts)
    if not isinstance(scores_B, Tensor) or scores_B.shape != (count,):
        got = f"shape {tuple(scores_B.shape)}" if isinstance(scores_B, Tensor) else type(scores_B).__name__
        raise RewardError(
            f"reward {batch.name!r} returned {got} for {count} images, first prompt {batch.prompts[:1]!r}"
        )
    return scores_B.detach().float().cpu()


def _within(batch: Batch, call: Callable[[], Any]) -> Any:
    """Run a call with a limit of time.

    Raises RewardError after `seconds`. A thread that hangs is left behind, and ends with the process.
    """
    if not batch.seconds:
        return call()
    import torch

    found: Future[Any] = Future()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(stream):  # both belong to a thread; the stream has the device
                found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        found.exception(batch.seconds)
    except TimeoutError:
        raise RewardError(
            f"reward {batch.name!r} has not answered for {len(batch.prompts)} images in {batch.seconds:g} s; "
            "where it needs longer, raise the limit (reward_seconds)"
        ) from None
    return found.result()
