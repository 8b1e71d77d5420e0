"""SPO: preference optimisation step by step on own samples (arXiv 2406.04314).

    L = -log sigmoid( beta (log R_w - log R_l) ),   R = clip( pi_theta(x' | x) / pi_ref(x' | x), 1 - eps, 1 + eps )

    x'     k candidates from the SAME x, from step `divert_start_step` on
    s      score of the decoded x0_hat, the network's estimate at the next time (at the end, x0 itself)
    w, l   the winner has the top score, the loser the bottom one
    kept   a pair is kept iff the two entries of softmax(score_scale [s_w, s_l]) differ by more than `threshold`:
           tanh(score_scale (s_w - s_l) / 2) > threshold. `score_scale` brings a reward to the units of the threshold
    pi     log-probabilities are means over latent dimensions; ref is the network with its adapter off

A uniformly random candidate continues the chain, not always the winner. So later pairs do not depend on earlier
scores. Scores come from a step-aware preference model (`preference_model`), which is told the time, or from any
reward. With `compare_every` m, candidates go m steps alone before they are scored, and each of the m transitions is a
pair. The published runs on large models have m = 4. With m = 1, winner and loser share x, and so one network
evaluation.

Deviations from the paper and the official code
1. Gradients are clipped: the official clip_grad_norm_ gets an iterator that the optimizer has already used up.
2. There is no second copy of the network for ref.
3. Candidates, and who continues, depend on (seed, iteration, prompt, k) alone, and not on a global generator.
4. All processes' kept pairs of an iteration are dealt out to updates of at most `pairs_per_update` pairs. Updates are
   as equal as they can be, no pair is dropped, and a loss is the mean over the pairs of its update.

    accelerate launch train_spo.py --config configs/tiny/spo_sd3.yaml

Legend: B chains or pairs of a batch, K candidates, P pairs of one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards import RewardMix, step_aware
from rewards.background import EarlyScores
from rlg.diffusion import process, sampling
from rlg.diffusion.conditioning import Conditioning, Outputs
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import Step, trajectory
from rlg.guidance.guided import with_cfg
from trainers.core.online import OnlineTrainer, Part
from trainers.core.setup import Given
from trainers.spo_config import SPOConfig


def spo_loss(
    win_log_ratio_B: Tensor, lose_log_ratio_B: Tensor, weight_B: Tensor, beta: float, epsilon: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of B pairs' losses, and metrics with the same weights.

    log ratios: log pi_theta - log pi_ref of winner and loser, (B,), with gradient. weights: 1 / B for a plain mean.
    """
    low, high = math.log(1 - epsilon), math.log(1 + epsilon)
    win_B, lose_B = win_log_ratio_B.clamp(low, high), lose_log_ratio_B.clamp(low, high)
    loss = (weight_B * -logsigmoid(beta * (win_B - lose_B))).sum()
    outside_B = ((win_B != win_log_ratio_B).float() + (lose_B != lose_log_ratio_B).float()) / 2
    margin_B = win_log_ratio_B - lose_log_ratio_B
    metrics = {
        "loss": loss,
        "ratio_win": (weight_B * win_B.exp()).sum(),
        "ratio_lose": (weight_B * lose_B.exp()).sum(),
        "clip_fraction": (weight_B * outside_B).sum(),
        "accuracy": (weight_B * ((margin_B > 0).float() + 0.5 * (margin_B == 0).float())).sum(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def choose_pairs(score_KB: Tensor, threshold: float, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a winner and a loser among the candidates of each chain.

    Returns (index of the winner, index of the loser, pair is kept), (B,) each.
    """
    win_B, lose_B = score_KB.argmax(dim=0), score_KB.argmin(dim=0)
    top_2B = scale * torch.stack([score_KB.amax(dim=0), score_KB.amin(dim=0)])
    share_2B = top_2B.softmax(dim=0)
    return win_B, lose_B, share_2B[0] - share_2B[1] > threshold


class StepScorer(Protocol):
    """Protocol of a judge of states of the chain."""

    def score(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], t_B: Tensor
    ) -> Tensor:
        """(B,) scores of images in [0, 1].

        The images are estimates of x0 at the network's time t; at time 0 they are x0 itself.
        """


@dataclass(frozen=True)
class RewardScorer:
    """Any reward as a scorer that does not know the time."""

    reward: RewardMix

    def score(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], t_B: Tensor
    ) -> Tensor:
        """The rewards' weighted total."""
        return self.reward(images_B3HW, prompts, metadata).total_B


@dataclass(frozen=True)
class Pairs:
    """P pairs of transitions, on the policy's device.

    They are all that were compared, kept or not.
    """

    win_x_PCHW: Tensor  # state before the step; equal to lose_x where candidates are compared after every step
    win_next_PCHW: Tensor  # state after the step
    lose_x_PCHW: Tensor
    lose_next_PCHW: Tensor
    step_P: Tensor  # index of the denoising step
    chain_P: Tensor  # index of the chain
    kept_P: Tensor  # bool

    def __getitem__(self, index: Tensor) -> Pairs:
        return Pairs(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def cat(parts: Sequence[Pairs]) -> Pairs:
        """Join parts in order."""
        return Pairs(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Pairs)))


@dataclass(frozen=True)
class Rollout:
    """One process's chains of an iteration, and their pairs."""

    images_B3HW: Tensor  # decoded ends of the chains
    prompt_B: Tensor  # index of each chain's prompt
    cond: Conditioning  # prompts of the chains, encoded
    pairs: Pairs
    scores_N: Tensor  # scores of all candidates, fp32 on CPU
    schedule: Schedule
    early: EarlyScores | None = None  # scores of the chains' ends


@dataclass(frozen=True)
class Race:
    """Candidates that left one x of each chain, S steps later."""

    states_KSBCHW: Tensor  # (K, S + 1, B, C, H, W)
    outs_KBCHW: Tensor | None  # the network's output after the last step; None at the end of the chain
    score_KB: Tensor  # on CPU


class SPOTrainer(OnlineTrainer):
    """Trainer that diverges, scores, pairs and updates; see the module's docstring."""

    shown = ("reward", "preference_mean", "pairs_kept", "loss")
    config: SPOConfig

    def load(self, given: Given) -> None:
        """Load rewards, prompts and the scorer.

        The scorer is the step-aware model where the config names one.
        """
        super().load(given)
        name, device = self.config.preference_model, self.accelerator.device
        self.scorer: StepScorer = step_aware.load(name).to(device) if name else RewardScorer(self.reward)

    def set_up(self) -> None:
        """Add the policies of the loss, and the races.

        Raises ValueError if no step is stochastic.
        """
        config = self.config
        scale = config.cfg if config.train_cfg is None else config.train_cfg
        self.train_tuned_with_cfg = with_cfg(self.policy.predict, self.negative, scale)
        self.train_base_with_cfg = with_cfg(self.policy.reference, self.negative, scale)
        self.segments = self._segments(self.sampler(config.steps))

    def sampler(self, steps: int) -> Schedule:
        """The kernel that is trained, stochastic at every step."""
        return self.schedule(steps, self.config.kernel, self.config.level)

    def _segments(self, schedule: Schedule) -> list[tuple[int, int]]:
        """(first, last) of each race, whose steps are first <= i < last.

        Raises ValueError if there is none.
        """
        config, stochastic = self.config, set(schedule.stochastic_steps())
        steps = [i for i in range(config.divert_start_step, config.last_step) if i in stochastic]
        if not steps:
            raise ValueError(
                f"no step from {config.divert_start_step} to {config.last_step} of {config.kernel} is stochastic"
            )
        end = steps[-1] + 1
        return [(i, min(i + config.compare_every, end)) for i in range(steps[0], end, config.compare_every)]

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Sample this process's chains and their pairs.

        They depend on (seed, iteration) and the scores alone.
        """
        schedule = self.sampler(self.config.steps)
        parts = self.parts(torch.Generator().manual_seed(self.iteration_seed()))
        images, pairs, scores, count = [], [], [], 0
        early = EarlyScores(self.reward) if self.reward else None
        for part in parts:
            x0, found, score_N = self._chains(schedule, part, count)
            images.append(self.decode(x0, part, early))
            pairs += found
            scores.append(score_N)
            count += len(x0)
        return Rollout(
            torch.cat(images),
            torch.cat([part.prompt_B for part in parts]),
            Conditioning.cat([part.cond for part in parts]),
            Pairs.cat(pairs),
            torch.cat(scores),
            schedule,
            early,
        )

    def _chains(self, schedule: Schedule, part: Part, first_chain: int) -> tuple[Tensor, list[Pairs], Tensor]:
        """(x0, pairs of each race, all scores) of a batch of chains.

        A chain goes alone to its first race, through every race, and alone to the end.
        """
        choosers = [sample.generator("choice") for sample in part.noise.ids]
        x, (first, last) = part.noise.initial(), (self.segments[0][0], self.segments[-1][1])
        for step in self._steps(schedule, (0, first), x, None, part):
            x = step.x_next_BCHW
        out = self._predict(schedule, first, x, part.cond)
        pairs, scores, rows = [], [], torch.arange(len(x))
        for span in self.segments:
            race = self._race(schedule, span, x, out, part)
            pairs.append(self._pairs(race, span[0], first_chain))
            scores.append(race.score_KB.flatten())
            chosen = torch.cat([torch.randint(self.config.num_candidates, (1,), generator=g) for g in choosers])
            x = race.states_KSBCHW[chosen, -1, rows]
            out = race.outs_KBCHW[chosen, rows] if race.outs_KBCHW is not None else None
        for step in self._steps(schedule, (last, len(schedule)), x, out, part):
            x = step.x_next_BCHW
        return x, pairs, torch.cat(scores)

    def _steps(
        self, schedule: Schedule, span: tuple[int, int], x: Tensor, out: Tensor | None, part: Part
    ) -> Iterator[Step]:
        """Steps first <= i < last from x.

        out: the network's output at x, where it is known.
        """
        outputs = None if out is None else Outputs(out)
        places = {"start": span[0], "stop": span[1]}
        return trajectory(self._predict_at, schedule, part.cond, part.noise, x=x, outputs=outputs, **places)

    def _predict(self, schedule: Schedule, i: int, x: Tensor, cond: Conditioning) -> Tensor | None:
        """The network's output before step i; None after the last step."""
        return None if i == len(schedule) else self._predict_at(x, sampling.times(schedule, i, len(x)), cond)

    def _predict_at(self, x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        with self.accelerator.autocast():
            return self.tuned_with_cfg(x, t_B, cond).float()

    def _race(self, schedule: Schedule, span: tuple[int, int], x: Tensor, out: Tensor, part: Part) -> Race:
        """Run the candidates one after the other.

        A batch of the network is thus no larger than the config says.
        """
        states, outs, scores = [], [], []
        for _ in range(self.config.num_candidates):
            path = [x, *(step.x_next_BCHW for step in self._steps(schedule, span, x, out, part))]
            ahead = self._predict(schedule, span[1], path[-1], part.cond)
            states.append(torch.stack(path))
            outs.append(ahead)
            scores.append(self._score(schedule, span[1], path[-1], ahead, part))
        ahead_KBCHW = None if outs[0] is None else torch.stack(outs)
        return Race(torch.stack(states), ahead_KBCHW, torch.stack(scores))

    def _score(self, schedule: Schedule, i: int, x: Tensor, out: Tensor | None, part: Part) -> Tensor:
        """(B,) scores of states before step i, or of ends.

        The end of a chain has no further step.
        """
        x0 = x if out is None else process.predict_x0(schedule, i, x, out)
        t_B = torch.zeros(len(x), device=x.device) if out is None else sampling.times(schedule, i, len(x))
        prompts = [self.prompts[p] for p in part.prompt_B.tolist()]
        images = self.policy.decode(x0, self.config.batch_size)
        score_B = self.scorer.score(images, [p.text for p in prompts], [p.metadata for p in prompts], t_B)
        return score_B.detach().float().cpu()

    def _pairs(self, race: Race, first: int, first_chain: int) -> Pairs:
        _, states, count = race.states_KSBCHW.shape[:3]
        win_B, lose_B, kept_B = choose_pairs(race.score_KB, self.config.threshold, self.config.score_scale)
        rows, steps = torch.arange(count), states - 1
        win, lose = (race.states_KSBCHW[index_B, :, rows] for index_B in (win_B, lose_B))  # (B, S + 1, C, H, W)
        device = win.device
        return Pairs(
            *(x.flatten(0, 1) for x in (win[:, :-1], win[:, 1:], lose[:, :-1], lose[:, 1:])),
            torch.arange(first, first + steps, device=device).repeat(count),
            (first_chain + rows).repeat_interleave(steps).to(device),
            kept_B.repeat_interleave(steps).to(device),
        )

    def score(self, samples: Rollout) -> tuple[Tensor | None, dict[str, float]]:
        """Gather scores of the chains' ends.

        Returns (zeros, metrics over all processes). There are no advantages, hence the zeros; None stands for them if
        no score is finite. A pair with a score that is not finite is not kept.
        """
        score_N = self.accelerator.gather(samples.scores_N.to(self.accelerator.device))
        metrics = super().score(samples)[1] if self.reward is not None else {}
        score_N = score_N[score_N.isfinite()]
        if not len(score_N):
            return None, metrics
        metrics |= {"preference_mean": float(score_N.mean()), "preference_std": float(score_N.std(unbiased=False))}
        return torch.zeros(len(samples.prompt_B)), metrics

    def advantages(self, total_B: Tensor, parts: dict[str, Tensor], group_B: Tensor) -> Tensor:
        """(B,) zeros, because pairs of candidates count and samples do not."""
        return torch.zeros_like(total_B)

    def update(self, roll: Rollout, advantage_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration.

        There is none if no pair was kept.
        """
        config, rank = self.config, self.accelerator.process_index
        kept_P = roll.pairs.kept_P.cpu().nonzero().flatten()
        generator = torch.Generator().manual_seed(self.iteration_seed() * 1009 + rank)
        kept_P = kept_P[torch.randperm(len(kept_P), generator=generator)]
        count = int(self._on_all(len(kept_P)).sum())
        updates = -(-count // (config.pairs_per_update or max(count, 1)))
        made, collected = 0, []
        for chunk in kept_P.tensor_split(updates) if updates else ():
            rows = self._one_update(roll, chunk)
            made += bool(rows)
            collected += rows
        compared = int(self._on_all(len(roll.pairs.kept_P)).sum())
        metrics = self.mean_metrics(collected) if collected else {}
        return metrics | {"pairs": count, "pairs_kept": count / compared, "updates": made}

    def _one_update(self, roll: Rollout, chosen: Tensor) -> list[dict[str, Tensor]]:
        """Take one optimizer step on some of this process's pairs.

        All batches have one size. Returns [] if no process has a pair.
        """
        size, world = self.config.batch_size, self.accelerator.num_processes
        counts = self._on_all(len(chosen))
        passes, total = -(-int(counts.max()) // size), int(counts.sum())
        if not total:
            return []
        self.begin_updates(passes)
        collected = []
        for n in range(passes):
            index = chosen[n * size : (n + 1) * size]
            weight_B = torch.zeros(size, device=self.policy.device)
            # accelerate takes the mean of gradients over passes and processes; undo it
            weight_B[: len(index)] = passes * world / total
            index = torch.cat([index, index.new_zeros(size - len(index))]).to(self.policy.device)
            with self.accelerator.accumulate(self.policy.wrapped):
                loss, metrics = self.loss(roll, index, weight_B)
                self.backward(loss, metrics)
            collected.append(metrics)
        return collected

    def _on_all(self, count: int) -> Tensor:
        """The count of every process."""
        return self.accelerator.gather(torch.tensor([count], device=self.accelerator.device))

    def loss(self, roll: Rollout, index_B: Tensor, weight_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of the pairs at these indices."""
        pairs, schedule = roll.pairs[index_B], roll.schedule
        copies = 1 if self.config.compare_every == 1 else 2  # with one x, winner and loser share the network's output
        x = torch.cat([pairs.win_x_PCHW, pairs.lose_x_PCHW][:copies])
        t_B, cond = schedule.t[pairs.step_P].repeat(copies), Conditioning.cat([roll.cond[pairs.chain_P]] * copies)
        with self.accelerator.autocast():
            with torch.no_grad():
                refs = self.train_base_with_cfg(x, t_B, cond).chunk(copies)
            outs = self.train_tuned_with_cfg(x, t_B, cond).chunk(copies)

        def log_ratio(x: Tensor, x_next: Tensor, side: int) -> Tensor:
            logp, ref = (process.log_prob_at(schedule, pairs.step_P, x, y[side], x_next) for y in (outs, refs))
            return logp - ref

        win = log_ratio(pairs.win_x_PCHW, pairs.win_next_PCHW, 0)
        lose = log_ratio(pairs.lose_x_PCHW, pairs.lose_next_PCHW, -1)
        return spo_loss(win, lose, weight_B, self.config.beta, self.config.epsilon)
