"""The loop carries what stands on it: particles, gradients through some steps, and blends with a known image."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlg.diffusion import process, sampling
from rlg.diffusion.conditioning import Conditioning, Outputs, Predictor
from rlg.diffusion.process import Schedule, make_schedule
from rlg.diffusion.sampling import Move, Moved, Observer, SampleId, SampleNoise, Step, advance, trajectory
from rlg.equivalence.mixtures import MEMORYLESS, PROCESSES, Mixture, ToyNoise, log_ratio
from rlg.guidance.corrector import systematic
from rlg.guidance.guided import rlg
from rlg.guidance.observers import PassCounter, PathKL
from rlg.stats import ess

SHAPE = (2, 4, 4)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
IDS = [SampleId(3, prompt, k) for prompt in (5, 8) for k in range(2)]


def rows(batch: int) -> Conditioning:
    """A conditioning that names its rows."""
    return Conditioning({"row": torch.arange(batch)})


def half(x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    """A network."""
    return 0.5 * x


class FK(Move):
    """Feynman-Kac steering of one group (arXiv 2501.06848): psi = exp(r(x0_hat)), and exp(r(x0)) at the end."""

    def __init__(self, predict: Predictor, reward: Callable[[Tensor], Tensor], particles: int, seed: int):
        self.predict, self.reward = predict, reward
        self.generator = torch.Generator().manual_seed(seed)
        self.value_B = self.log_weight_B = torch.zeros(particles, dtype=torch.float64)
        self.resampled = 0

    def move(self, step: Step) -> Moved:
        """Weigh x_next, resample below 90% of effective particles, and keep the outputs for the next step."""
        x, outputs, i = step.x_next_BCHW, None, step.i + 1
        x0 = x
        if not step.is_last:
            out = self.predict(x, sampling.times(step.schedule, i, len(x)), step.cond)
            x0, outputs = process.predict_x0(step.schedule, i, x, out), Outputs(out)
        value_B = self.reward(x0)
        self.log_weight_B, self.value_B = self.log_weight_B + value_B - self.value_B, value_B
        if ess(self.log_weight_B.numpy()) >= 0.9 and not step.is_last:
            return Moved(x, outputs=outputs)
        index_B = systematic(self.log_weight_B, float(torch.rand((), generator=self.generator)))
        self.log_weight_B, self.resampled = torch.zeros_like(value_B), self.resampled + 1
        return Moved(x[index_B], index_B, None if outputs is None else outputs[index_B])

    def gather(self, index_B: Tensor) -> None:
        """Each particle has its ancestor's potential."""
        self.value_B, self.log_weight_B = self.value_B[index_B], self.log_weight_B[index_B]


def test_particles_land_on_the_tilted_law() -> None:
    """Modes at -5 and 5, half each; r = log of (0.2, 0.8) over (0.5, 0.5): mean 3, and 0 without steering.

    16 runs of 200 particles: the mean is within 4 standard errors between runs, which are at most 0.15.
    """
    base, tuned = (Mixture.of((1 - p, -5.0, 1.0), (p, 5.0, 1.0)) for p in (0.5, 0.8))
    calls, network = [], base.predictor(PROCESSES["flow"])

    def predict(x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        calls.append(float(t_B[0]))
        return network(x, t_B, cond)

    schedule = make_schedule(PROCESSES["flow"], 40, "sde", MEMORYLESS["flow"])
    means = []
    for seed in range(16):
        steering = FK(predict, lambda x: log_ratio(base, tuned, x.flatten(1)), 200, seed)
        x = sampling.sample(predict, schedule, rows(200), ToyNoise(200, 1, seed), [steering])
        means.append(float(x.mean()))
        assert steering.resampled > 2
        assert len(calls) == len(schedule)  # what the move asked is not asked again
        calls.clear()
    mean_R = torch.tensor(means)
    error = float(mean_R.std()) / 4
    assert error < 0.15 and abs(float(mean_R.mean()) - 3) < 4 * error


def reward(x: Tensor) -> Tensor:
    """A smooth reward of final latents, as a sum over the batch."""
    return (x.sin() * torch.arange(x[0].numel()).reshape(SHAPE)).sum()


def draft_gradient(
    schedule: Schedule, last: int, step: Callable[..., Tensor] | None = None
) -> tuple[list[Step], Tensor]:
    """(steps, gradient of the reward in the network's weight) through the last steps of the loop."""
    theta = torch.tensor(0.7, requires_grad=True)
    noise, cut = SampleNoise(IDS, SHAPE), len(schedule) - last

    def predict(x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        return theta * (x + 0.001 * t_B[:, None, None, None]).cos()

    with torch.no_grad():
        steps = list(trajectory(predict, schedule, rows(4), noise, stop=cut))
    x = steps[-1].x_next_BCHW
    if step is None:
        steps += trajectory(predict, schedule, rows(4), noise, start=cut, x=x)
        x = steps[-1].x_next_BCHW
    else:
        for i in range(cut, len(schedule)):
            x = step(predict, i, x, noise.step())
    reward(x).backward()
    assert theta.grad is not None
    return steps, theta.grad


@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_gradient_through_the_last_steps_is_that_of_a_plain_loop(last: int) -> None:
    """DRaFT-K (arXiv 2309.17400), K = 1, 2 and all but one."""
    schedule = make_schedule(FLOW, 6, "sde", 0.7)
    steps, gradient = draft_gradient(schedule, last)
    assert [step.x_next_BCHW.requires_grad for step in steps] == [False] * (6 - last) + [True] * last

    theta, noise = torch.tensor(0.7, requires_grad=True), SampleNoise(IDS, SHAPE)
    x = noise.initial()
    for i in range(6):
        x = x.detach() if i <= 6 - last else x
        out = theta * (x + 0.001 * schedule.t[i]).cos()
        z = noise.step() if schedule.std[i] > 0 else 0.0
        x = schedule.a_x[i] * x + schedule.a_out[i] * out + schedule.std[i] * z
    reward(x).backward()
    assert torch.allclose(steps[-1].x_next_BCHW, x, atol=1e-5)
    assert float(gradient) == pytest.approx(float(theta.grad), rel=1e-4)
    if last == 2:  # its value is not the one of another K
        assert float(gradient) != pytest.approx(float(draft_gradient(schedule, 1)[1]), rel=0.01)


def test_a_gradient_reaches_the_initial_noise() -> None:
    """As direct optimisation of noise needs it: x is linear in x_T, by the product of a_x + a_out / 2."""
    schedule = make_schedule(FLOW, 6, "ode")
    x = torch.ones(4, *SHAPE, requires_grad=True)
    *_, end = trajectory(half, schedule, rows(4), SampleNoise(IDS, SHAPE), x=x)
    end.x_next_BCHW.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, float((schedule.a_x + schedule.a_out / 2).prod())))


def test_steps_can_be_checkpointed() -> None:
    schedule = make_schedule(FLOW, 4, "sde", 0.7)

    def again(predict: Predictor, i: int, x: Tensor, z: Tensor) -> Tensor:
        def step(x: Tensor) -> Tensor:
            return advance(schedule, i, x, predict, rows(4), z).x_next_BCHW

        return checkpoint(step, x, use_reentrant=False)

    assert float(draft_gradient(schedule, 3, again)[1]) == pytest.approx(float(draft_gradient(schedule, 3)[1]))


class Blend(Move):
    """Inpainting: where an image is known, x is that image at the noise of the next step."""

    def __init__(self, image_CHW: Tensor, known_HW: Tensor, eps_BCHW: Tensor):
        self.image_CHW, self.known_HW, self.eps_BCHW = image_CHW, known_HW, eps_BCHW

    def move(self, step: Step) -> Moved:
        """Blend after the kernel."""
        alpha, sigma = step.schedule.alpha[step.i + 1], step.schedule.sigma[step.i + 1]
        known = alpha * self.image_CHW + sigma * self.eps_BCHW
        return Moved(torch.where(self.known_HW, known, step.x_next_BCHW))

    def gather(self, index_B: Tensor) -> None:
        """A copy of a sample keeps the noise of its known part."""
        self.eps_BCHW = self.eps_BCHW[index_B]


@pytest.mark.parametrize("kernel", ["ode", "sde", "cps"])
def test_a_blend_after_each_step_ends_at_the_known_half(kernel: str) -> None:
    """Exactly; and the network, which pulls every pixel to the image's mean, carries it to the other half."""
    schedule = make_schedule(FLOW, 8, kernel, 0.7, window=(0, 7))
    known_HW = torch.arange(4) < 2
    blend = Blend(torch.full(SHAPE, 3.0), known_HW.expand(4, 4), SampleNoise(IDS[::-1], SHAPE).initial())

    def predict(x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        return (x - x.mean(dim=(1, 2, 3), keepdim=True)) / (t_B[:, None, None, None] / 1000)

    steps = list(trajectory(predict, schedule, rows(4), SampleNoise(IDS, SHAPE), moves=[blend]))
    for step, following in pairwise(steps):
        assert torch.equal(step.x_next_BCHW, following.x_BCHW)
    x0 = steps[-1].x_next_BCHW
    assert torch.equal(x0[..., known_HW], torch.full_like(x0[..., known_HW], 3.0))
    alone = sampling.sample(predict, schedule, rows(4), SampleNoise(IDS, SHAPE))
    assert float(x0[..., ~known_HW].mean()) > float(alone.mean()) + 1


def test_a_trajectory_can_be_cut_anywhere() -> None:
    schedule, cond = make_schedule(FLOW, 5, "sde", 0.7), rows(4)
    whole = sampling.sample(half, schedule, cond, SampleNoise(IDS, SHAPE))
    noise = SampleNoise(IDS, SHAPE)
    *_, before = trajectory(half, schedule, cond, noise, stop=3)
    x, known = before.x_next_BCHW, Outputs(half(before.x_next_BCHW, before.t_B, cond))
    *_, after = trajectory(half, schedule, cond, noise, start=3, x=x, outputs=known)
    assert (before.is_last, after.is_last) == (False, True)
    assert torch.equal(after.x_next_BCHW, whole)


def test_a_shift_moves_the_mean_and_outputs_that_are_known_are_not_asked_for() -> None:
    schedule, cond, calls = make_schedule(FLOW, 5, "sde", 0.7), rows(4), []
    x, z = torch.ones(4, *SHAPE), torch.zeros(4, *SHAPE)

    def predict(x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        calls.append(t_B)
        return half(x, t_B, cond)

    plain = advance(schedule, 2, x, predict, cond, z)
    moved = advance(schedule, 2, x, predict, cond, z, shift=lambda s, i, x, outputs: 10 * i * outputs.out_BCHW)
    torch.testing.assert_close(moved.x_next_BCHW - plain.x_next_BCHW, 10 * x)  # 20 times half of 1
    assert len(calls) == 2
    again = list(trajectory(predict, schedule, cond, SampleNoise(IDS, SHAPE), stop=2, outputs=plain.outputs, x=x))
    assert len(calls) == 3 and torch.equal(again[0].outputs.out_BCHW, x / 2)


class Reorder(Move):
    """After one step, these rows."""

    def __init__(self, at: int, index: list[int]):
        self.at, self.index = at, torch.tensor(index)
        self.tag_B = torch.arange(4)

    def move(self, step: Step) -> Moved:
        """Take the rows."""
        if step.i != self.at:
            return Moved(step.x_next_BCHW)
        return Moved(step.x_next_BCHW[self.index], self.index)

    def gather(self, index_B: Tensor) -> None:
        """Remember the ancestors."""
        self.tag_B = self.tag_B[index_B]


class Seen(Observer):
    """Rows and states as they were drawn."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.tag_B = torch.arange(4)

    def see(self, step: Step) -> None:
        """Note the rows."""
        self.rows.append(step.cond.tensors["row"].tolist())

    def gather(self, index_B: Tensor) -> None:
        """Remember the ancestors."""
        self.tag_B = self.tag_B[index_B]


@pytest.mark.parametrize("index", [[1, 1, 3, 2], [0, 2], [0, 0, 1, 1, 2, 3]], ids=["copy", "shrink", "grow"])
def test_all_that_belongs_to_a_sample_follows_it(index: list[int]) -> None:
    schedule, seen = make_schedule(FLOW, 4, "sde", 0.7), Seen()
    move, other = Reorder(1, index), Reorder(-1, [])
    steps = list(trajectory(half, schedule, rows(4), SampleNoise(IDS, SHAPE), moves=[move, other], observers=[seen]))
    assert seen.rows == [[0, 1, 2, 3]] * 2 + [index] * 2
    for step in steps[1:]:  # a move shows in its own step, as the loop goes on from it
        assert step.cond.tensors["row"].tolist() == index
        assert len(step.x_BCHW) == len(step.x_next_BCHW) == len(step.outputs.out_BCHW) == len(index)
    assert torch.equal(steps[1].outputs.out_BCHW, 0.5 * steps[1].x_BCHW)
    assert torch.equal(steps[1].x_BCHW, steps[0].x_next_BCHW[index])
    assert move.tag_B.tolist() == other.tag_B.tolist() == seen.tag_B.tolist() == index


def test_the_costs_of_a_path_follow_its_rows() -> None:
    """A step adds D (w c a_out)^2 / (2 std^2) nats, where base and tuned are c apart; w = 1 takes one pass, w = 2 two.

    c is of the conditioning, so that it follows; w is of the place. Rows 1, 1, 3, 2 go on into the last step.
    """
    schedule = make_schedule(FLOW, 4, "sde", 0.7, window=(1, 4))
    w_B = torch.tensor([2.0, 1.0, 2.0, 2.0])
    guided = rlg(half, lambda x, t_B, cond: 0.5 * x + cond.tensors["row"][:, None, None, None], w_B)
    kl, passes = PathKL(half, 4, True, lambda: 0.0), PassCounter(guided, 4)
    move = Reorder(2, [1, 1, 3, 2])
    sampling.sample(guided.with_base, schedule, rows(4), SampleNoise(IDS, SHAPE), [move], [kl, passes])
    before, last = (32 * schedule.a_out[i] ** 2 / (2 * schedule.std[i] ** 2) for i in (slice(1, 3), slice(3, 4)))
    expected = [
        float(gap**2 * before.sum() + last_gap**2 * last.sum())
        for gap, last_gap in ((1.0, 2.0), (1.0, 1.0), (6.0, 6.0), (4.0, 4.0))
    ]
    assert kl.kl_B.tolist() == pytest.approx(expected, rel=1e-4)
    assert passes.passes_B.tolist() == [3 + 2, 3 + 1, 6 + 2, 6 + 2]


def step_noise(noise: SampleNoise, count: int) -> list[Tensor]:
    return [noise.step() for _ in range(count)]


@pytest.mark.numerics
def test_a_gathered_row_goes_on_with_the_noise_of_its_place_in_the_prompt() -> None:
    """Copies part at the next step; order within a batch, and other prompts, change nothing."""
    plain, noise = step_noise(SampleNoise(IDS, SHAPE), 3), SampleNoise(IDS, SHAPE)
    assert torch.equal(noise.step(), plain[0])
    copied = noise.gather(torch.tensor([1, 1, 2, 2]))
    assert copied.ids == IDS and torch.equal(copied.step(), plain[1])
    swapped = copied.gather(torch.tensor([3, 0]))  # one row a prompt, the second prompt first
    assert swapped.ids == [IDS[2], IDS[0]] and torch.equal(swapped.step(), plain[2][[2, 0]])


@pytest.mark.numerics
def test_rows_beyond_a_prompts_samples_take_turns_in_their_noise() -> None:
    noise = SampleNoise(IDS, SHAPE)
    first = noise.step()
    grown = noise.gather(torch.tensor([0, 0, 1, 0, 3]))  # 4 of the first prompt, 1 of the second
    alone = SampleNoise(IDS[:2], SHAPE)
    alone.step()
    others = alone.gather(torch.tensor([1, 1, 0, 0]))
    later, expected = step_noise(grown, 2), step_noise(others, 2)
    assert torch.equal(torch.stack(later)[:, :4], torch.stack(expected))
    again = grown.gather(torch.tensor([0])).gather(torch.tensor([0, 0, 0])).step()  # nothing starts anew
    drawn = torch.cat([first, *later, again]).flatten(1)
    correlation = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert float(correlation.abs().max()) < 0.75  # 32 dimensions: 4 standard errors


def test_noise_of_a_law_that_is_known_follows_the_number_of_rows() -> None:
    noise = ToyNoise(4, 1, seed=0)
    assert [noise.gather(torch.arange(n)).step().shape for n in (2, 6)] == [(2, 1, 1, 1), (6, 1, 1, 1)]
    assert not math.isclose(float(noise.step()[0]), float(noise.gather(torch.arange(2)).step()[0]))
