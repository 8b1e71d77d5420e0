"""Ways to run guidance at different costs.

    guided = base + w (tuned - base) = tuned + (w - 1) d          d = tuned - base          full: two passes a step

    full                 exact: two passes
    tuned                w = 1, one pass: the reference for costs
    interval:LOW:HIGH    d = 0 outside LOW < sigma <= HIGH, one pass there (arXiv 2404.07724, for w)
    reuse:N[:linear]     d is computed at every N-th step and kept between (linear: extrapolated from the last two)
    reuse_at:I,J[:linear]      d is computed at steps I, J, ... (from 0); before the first of them it is 0
    scaled[:F]           the LoRA times 1 + F (w - 1), F = 1 by default: one pass, right to first order in the LoRA
    scaled_but:I,J[:carry]     scaled, but full at steps I, J, ...; carry: the error of `scaled` there is added later
    conditional[:equal]  under CFG, d of the conditional branch alone, 3 evaluations of 4; d of the unconditional
                         branch is assumed to be 0, or equal to it
    random               base or tuned, drawn at each step: one pass; a stochastic sampler, 0 <= w <= 1
                         (rlg.guidance.blend)

`MODE+batch` runs base and tuned model in one batch, in steps that need both. The result is the same up to rounding,
and this is faster for small batches. w = 0 and w = 1 take one pass in every mode. Approximate modes are used only if
they are named. `Mode.begin` is called for each trajectory, because a mode remembers earlier steps of its trajectory. A
step out of order is refused.

Legend: B batch, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlg.choices import (
    BATCH,
    CONDITIONAL,
    FULL,
    GUIDANCE_MODES,
    INTERVAL,
    RANDOM,
    REUSE,
    REUSE_AT,
    SCALED,
    SCALED_BUT,
    TUNED,
    cfg_rows,
)
from rlg.diffusion.conditioning import Conditioning, Predictor
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import SampleId
from rlg.guidance import blend
from rlg.guidance.guided import check_finite, rlg, with_cfg
from rlg.guidance.weight_schedule import WeightSchedule
from rlg.models import lora
from rlg.models.policy import Policy

_BOTH = (FULL, INTERVAL, REUSE, REUSE_AT, SCALED_BUT)  # kinds with steps that need both models
_LINEAR, _CARRY, _EQUAL = "linear", "carry", "equal"


@dataclass
class Models:
    """The passes of one policy under classifier-free guidance, with a counter."""

    policy: Policy
    negative: Conditioning
    cfg: float = 1.0
    evaluations: int = field(default=0, init=False)  # rows that went through the network

    def base(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The base model's output, fp32."""
        return self._run(self.policy.reference, x_BCHW, t_B, cond)

    def tuned(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The tuned model's output, fp32."""
        return self._run(self.policy.predict, x_BCHW, t_B, cond)

    def scaled(self, factor: float, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The output with the LoRA times a factor, in fp32."""
        with lora.scaled(self.policy.network, factor):
            return self.tuned(x_BCHW, t_B, cond)

    def both(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning, one_batch: bool) -> tuple[Tensor, Tensor]:
        """`(base output, tuned output)`, in two passes or in one batch."""
        if not one_batch:
            return self.base(x_BCHW, t_B, cond), self.tuned(x_BCHW, t_B, cond)
        factor = torch.arange(2.0, device=x_BCHW.device).repeat_interleave(len(x_BCHW))

        def rows(x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
            # Under CFG, x has twice as many rows.
            with lora.rows(self.policy.network, factor.repeat(len(x) // len(factor))):
                return self.policy.predict(x, t, c)

        twice = torch.cat([x_BCHW] * 2), torch.cat([t_B] * 2), Conditioning.cat([cond] * 2)
        base, tuned = self._run(rows, *twice).chunk(2)
        return base, tuned

    def bare_difference(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """The tuned output, and the difference of the conditional branches.

        The output is under CFG. The difference is tuned - base of the conditional branch alone. The cost is 3
        evaluations a sample.
        """
        branches: list[Tensor] = []

        def keep(x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
            branches.append(self.policy.predict(x, t, c).float())
            return branches[0]

        tuned = self._run(keep, x_BCHW, t_B, cond)
        self.evaluations += len(x_BCHW)
        return tuned, branches[0][len(x_BCHW) :] - self.policy.reference(x_BCHW, t_B, cond).float()

    def _run(self, predict: Predictor, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        self.evaluations += len(x_BCHW) * cfg_rows(self.cfg)
        return with_cfg(predict, self.negative, self.cfg)(x_BCHW, t_B, cond).float()


@dataclass(frozen=True)
class Mode:
    """A way to run guidance."""

    kind: str
    interval: WeightSchedule | None = None
    every: int = 0  # N in `reuse:N`
    steps: tuple[int, ...] = ()  # I, J, ... in `reuse_at` and `scaled_but`
    factor: float = 1.0  # F in `scaled:F`
    option: str = ""  # linear, carry or equal
    one_batch: bool = False

    @classmethod
    def parse(cls, text: str) -> Mode:
        """One of `GUIDANCE_MODES`, with or without `+batch`.

        Raises ValueError for anything else.
        """
        bare, plus, rest = text.partition(BATCH)
        kind, *arguments = bare.split(":")
        try:
            mode = _parse(kind, bare, arguments)
        except ValueError as error:
            raise ValueError(
                f"unknown mode of guidance {text!r} ({error}); known: {', '.join(GUIDANCE_MODES)}"
            ) from error
        if rest or (plus and kind not in _BOTH):
            raise ValueError(f"mode {text!r}: {BATCH} goes at the end of one of {', '.join(_BOTH)}")
        return cls(**{**vars(mode), "one_batch": bool(plus)})

    def __str__(self) -> str:
        """The text that `parse` reads."""
        parts = [str(self.interval) if self.interval else self.kind]
        parts += [str(self.every)] if self.every else []
        parts += [",".join(map(str, self.steps))] if self.steps else []
        parts += [f"{self.factor:g}"] if self.factor != 1 else []
        parts += [self.option] if self.option else []
        return ":".join(parts) + (BATCH if self.one_batch else "")

    @property
    def exact(self) -> bool:
        """Tell whether the mode is full guidance up to rounding."""
        return self.kind == FULL

    def begin(self, models: Models, w: float, schedule: Schedule, ids: Sequence[SampleId]) -> Predictor:
        """The predictor of one trajectory.

        It has the network's own signature, and is called once for each step in turn. ids: those of the samples. Raises
        ValueError for a w that is not finite, and for a mode that does not fit the models or the schedule.
        """
        check_finite(w)
        self._check(models, w, schedule)
        if self.kind == TUNED or w == 1:
            return models.tuned
        if w == 0 and self.interval is None:
            return models.base
        if self.kind == RANDOM:
            w_B1 = torch.full((len(ids), 1), w)
            (weight,) = blend.one_at_a_time(w_B1, schedule, ids)
            return rlg(models.base, models.tuned, weight)
        return Trajectory(self, models, w, schedule)

    def _check(self, models: Models, w: float, schedule: Schedule) -> None:
        if models.policy.tuned is not None and (self.one_batch or self.kind in (SCALED, SCALED_BUT)):
            raise ValueError(f"mode {self} switches a LoRA, and the tuned model is a full network")
        if self.kind == CONDITIONAL and models.cfg == 1.0:
            raise ValueError(f"mode {self} leaves out a branch of classifier-free guidance, and the CFG scale is 1")
        if self.kind == RANDOM:
            stochastic = "sde" if schedule.stochastic_steps() else "ode"
            blend.check_drawn(RANDOM, [(w,)], stochastic, 1.0)
        if self.steps and max(self.steps) >= len(schedule):
            raise ValueError(
                f"mode {self}: there is no step {max(self.steps)}, the {len(schedule)} steps begin with 0"
            )

    def refreshes(self, schedule: Schedule) -> list[bool]:
        """(T,) True for the steps at which both models run."""
        if self.interval is not None:
            return [share > 0 for share in self.interval.shares(schedule)]
        if self.kind in (REUSE_AT, SCALED_BUT):
            return [i in self.steps for i in range(len(schedule))]
        return [self.kind == FULL or (self.kind == REUSE and i % self.every == 0) for i in range(len(schedule))]


def _parse(kind: str, bare: str, arguments: list[str]) -> Mode:
    if kind == INTERVAL:
        return Mode(kind, interval=WeightSchedule.parse(bare))
    flags = {REUSE: _LINEAR, REUSE_AT: _LINEAR, SCALED_BUT: _CARRY, CONDITIONAL: _EQUAL}
    option = arguments.pop() if arguments and arguments[-1] == flags.get(kind) else ""
    if kind in (FULL, TUNED, RANDOM, CONDITIONAL) and not arguments:
        return Mode(kind, option=option)
    if kind == SCALED and len(arguments) <= 1:
        factor = float(arguments[0]) if arguments else 1.0
        check_finite(factor)
        return Mode(kind, factor=factor)
    if kind == REUSE and len(arguments) == 1:
        if int(arguments[0]) < 1:
            raise ValueError("N must be at least 1")
        return Mode(kind, every=int(arguments[0]), option=option)
    if kind in (REUSE_AT, SCALED_BUT) and len(arguments) == 1:
        steps = tuple(sorted({int(step) for step in arguments[0].split(",")}))
        if steps[0] < 0:
            raise ValueError("steps count from 0")
        return Mode(kind, steps=steps, option=option)
    raise ValueError("no such form")


class Trajectory:
    """Guidance along one trajectory, with a memory of earlier steps.

    A mode that remembers must go through the steps in order. A call at the first time starts again. A call at any
    other time than the next step's raises ValueError: a sampler that evaluates a step several times (Heun) would
    otherwise get the difference of another point.
    """

    def __init__(self, mode: Mode, models: Models, w: float, schedule: Schedule):
        self.mode, self.models, self.w = mode, models, w
        self.times = schedule.t.tolist()
        self.refresh = mode.refreshes(schedule)
        self.remembers = mode.kind in (REUSE, REUSE_AT) or mode.option == _CARRY
        self._begin()

    def _begin(self) -> None:
        self.next = 0
        self.known: list[tuple[float, Tensor]] = []  # the last two kept tensors, each with its t

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        i = self._turn(float(t_B[0]), len(x_BCHW))
        inputs = x_BCHW, t_B, cond
        if self.mode.kind == CONDITIONAL:
            tuned, d = self.models.bare_difference(*inputs)
            return tuned + (self.w - 1) * (d if self.mode.option == _EQUAL else self.models.cfg * d)
        if self.refresh[i]:
            return self._full(i, inputs)
        if self.mode.kind in (SCALED, SCALED_BUT):
            return self.models.scaled(self._factor(), *inputs) + self._kept(self.times[i])
        return self.models.tuned(*inputs) + (self.w - 1) * self._kept(self.times[i])

    def _full(self, i: int, inputs: tuple[Tensor, Tensor, Conditioning]) -> Tensor:
        base, tuned = self.models.both(*inputs, self.mode.one_batch)
        guided = (1 - self.w) * base + self.w * tuned
        # Only the step that follows reads what is kept, and only if it does not run both models.
        used = self.remembers and not all(self.refresh[i + 1 : i + 2])
        if used and self.mode.option == _CARRY:
            self._keep(self.times[i], guided - self.models.scaled(self._factor(), *inputs))
        elif self.remembers and self.mode.option != _CARRY:
            self._keep(self.times[i], tuned - base)
        return guided

    def _factor(self) -> float:
        return 1 + self.mode.factor * (self.w - 1)

    def _turn(self, t: float, batch: int) -> int:
        """The index of a call's step."""
        if not self.remembers:
            return self._place(t)
        if t == self.times[0]:
            self._begin()
        expected = self.times[self.next] if self.next < len(self.times) else None
        if t != expected:
            following = "the end" if expected is None else f"t = {expected:g}"
            raise ValueError(
                f"mode {self.mode} goes through the steps in turn: called at t = {t:g} where {following} is next; a "
                "sampler that evaluates a step several times needs full guidance"
            )
        if self.known and len(self.known[0][1]) != batch:
            raise ValueError(f"mode {self.mode}: a batch of {batch} on the way of one of {len(self.known[0][1])}")
        self.next += 1
        return self.next - 1

    def _place(self, t: float) -> int:
        """The index of the step at time t.

        It is 0 where all steps are alike.
        """
        if len(set(self.refresh)) == 1:
            return 0
        if t not in self.times:
            raise ValueError(f"mode {self.mode}: t = {t:g} is no step of its schedule")
        return self.times.index(t)

    def _keep(self, t: float, what: Tensor) -> None:
        self.known = [*self.known[-1:], (t, what)]

    def _kept(self, t: float) -> Tensor | float:
        """The remembered tensor at time t, or 0 if there is none."""
        if not self.known:
            return 0.0
        t_last, last = self.known[-1]
        if self.mode.option != _LINEAR or len(self.known) < 2:
            return last
        t_before, before = self.known[0]
        return last + (last - before) * ((t - t_last) / (t_last - t_before))


def sweep(
    models: Models, w_B: Tensor, schedule: Schedule, ids: Sequence[SampleId], one_batch: bool = False
) -> Predictor:
    """Exact full guidance of several w in one batch.

    At the first step, images of one noise share their two passes. Later, a pass is skipped for the rows for which its
    weight is 0. w_B: on the CPU. ids: the noise that each row starts from. Rows with the same id are one image at
    several w.
    """
    unique = list(dict.fromkeys(ids))
    first = torch.tensor([ids.index(each) for each in unique])
    place_B = torch.tensor([unique.index(each) for each in ids])
    guided, t_first = rlg(models.base, models.tuned, w_B), float(schedule.t[0])

    def predictor(x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        if float(t_B[0]) != t_first:
            return guided(x_BCHW, t_B, cond)
        rows = first.to(x_BCHW.device)
        base, tuned = (
            out[place_B.to(out.device)] for out in models.both(x_BCHW[rows], t_B[rows], cond[rows], one_batch)
        )
        w = w_B.to(base).reshape(-1, *[1] * (base.ndim - 1))
        return (1 - w) * base + w * tuned

    return predictor
