"""SPO: loss and pairs by hand, candidates of one x and who continues, updates, and that a reward goes up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from tests.conftest import PROMPTS
from trainers.checkpoints.checkpoint import resume, save_checkpoint
from trainers.spo import Race, Rollout, SPOConfig, SPOTrainer, choose_pairs, spo_loss

Make = Callable[..., SPOTrainer]
REST = {"base": "m", "name": "n", "prompts": "p"}


@pytest.fixture
def tiny_spo(tiny_online: Callable[..., SPOTrainer]) -> Make:
    """4 chains of 3 steps, with 3 candidates from step 1 on; every pair that differs is kept."""

    def make(family: str = "sd3", **options: object) -> SPOTrainer:
        tiny = {"divert_start_step": 1, "num_candidates": 3, "threshold": 0.0, "pairs_per_update": None}
        return tiny_online("spo", family, **tiny | options)

    return make


def perturb(trainer: SPOTrainer, std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in trainer.policy.trainable():
        parameter.data.normal_(std=std, generator=generator)


def weights(trainer: SPOTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.policy.trainable()]


def watch_races(trainer: SPOTrainer) -> list[Race]:
    """The races of later rollouts, as they are run."""
    races, run = [], trainer._race
    trainer._race = lambda *args: races.append(run(*args)) or races[-1]  # type: ignore[method-assign]
    return races


def test_loss_by_hand() -> None:
    win, lose = torch.tensor([0.05, 0.30]), torch.tensor([-0.02, -0.04])
    loss, metrics = spo_loss(win, lose, torch.tensor([0.25, 0.75]), beta=10.0, epsilon=0.1)
    first = math.log(1 + math.exp(-10 * (0.05 + 0.02)))
    second = math.log(1 + math.exp(-10 * (math.log(1.1) + 0.04)))  # the winner's ratio e^0.3 is clipped to 1.1
    assert float(loss) == pytest.approx(0.25 * first + 0.75 * second)
    assert float(metrics["ratio_win"]) == pytest.approx(0.25 * math.exp(0.05) + 0.75 * 1.1)
    assert float(metrics["ratio_lose"]) == pytest.approx(0.25 * math.exp(-0.02) + 0.75 * math.exp(-0.04))
    assert float(metrics["clip_fraction"]) == pytest.approx(0.75 / 2)


@pytest.mark.parametrize(
    ("win", "lose", "slope"), [(0.0, 0.0, (-5.0, 5.0)), (0.2, 0.0, (0.0, 2.783)), (0.0, -0.2, (-2.586, 0))]
)
def test_loss_pulls_winners_up_and_losers_down_within_the_clip(
    win: float, lose: float, slope: tuple[float, float]
) -> None:
    """Slopes are -+ beta sigmoid(-beta margin), and 0 for a ratio beyond 1 +- epsilon."""
    log_ratios = [torch.tensor([value], requires_grad=True) for value in (win, lose)]
    loss, _ = spo_loss(*log_ratios, torch.ones(1), beta=10.0, epsilon=0.1)
    found = torch.autograd.grad(loss, log_ratios)
    assert [float(g) for g in found] == pytest.approx(list(slope), rel=2e-3)


def test_pairs_are_kept_beyond_the_threshold_of_the_softmax() -> None:
    score_KB = torch.tensor([[1.0, 0.0, 2.0, 5.0], [0.7, 0.5, 2.0, 4.0], [0.3, 1.0, 2.0, 4.4]])
    win, lose, kept = choose_pairs(score_KB, threshold=0.4)
    assert win[[0, 1, 3]].tolist() == [0, 2, 0] and lose[[0, 1, 3]].tolist() == [2, 0, 1]
    gaps = [0.7, 1.0, 0.0, 1.0]
    assert kept.tolist() == [math.tanh(gap / 2) > 0.4 for gap in gaps] == [False, True, False, True]
    assert choose_pairs(score_KB, 0.4, scale=2.0)[2].tolist() == [True, True, False, True]
    assert choose_pairs(score_KB, 0.0)[2].tolist() == [True, True, False, True]  # equal scores are no pair


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_candidates_share_x_and_differ_by_their_own_noise(kernel: str, tiny_spo: Make) -> None:
    trainer = tiny_spo(kernel=kernel)
    races, schedule = watch_races(trainer), trainer.sampler(trainer.config.steps)
    part = trainer.parts(torch.Generator().manual_seed(trainer.iteration_seed()))[0]
    trainer.rollout()
    assert trainer.segments == ([(1, 2), (2, 3)] if kernel == "sde" else [(1, 2)])  # cps ends deterministically
    part.noise.step()  # of step 0
    for (i, _), race in zip(trainer.segments, races, strict=True):
        x = race.states_KSBCHW[0, 0]
        assert all(torch.equal(x, other) for other in race.states_KSBCHW[:, 0])
        with torch.no_grad():
            out = trainer.tuned_with_cfg(x, schedule.t[i].expand(len(x)), part.cond)
        for states in race.states_KSBCHW:
            z = part.noise.step()
            expected = schedule.a_x[i] * x + schedule.a_out[i] * out + schedule.std[i] * z
            assert torch.allclose(states[1], expected, atol=1e-5)
            logp = process.log_prob(schedule, i, x, out, states[1])
            by_hand = (-(z.flatten(1) ** 2) / 2).mean(1) - math.log(schedule.std[i]) - math.log(2 * math.pi) / 2
            assert torch.allclose(logp, by_hand, atol=1e-3)
            steps = torch.full((len(x),), i)
            assert torch.allclose(process.log_prob_at(schedule, steps, x, out, states[1]), logp, atol=1e-5)


def test_log_prob_at_mixes_steps_and_refuses_deterministic_ones(tiny_spo: Make) -> None:
    trainer = tiny_spo("sd")
    schedule = trainer.sampler(trainer.config.steps)
    x, out, x_next = torch.randn(3, 3, *trainer.shape, generator=torch.Generator().manual_seed(0))
    mixed = process.log_prob_at(schedule, torch.tensor([2, 0, 1]), x, out, x_next)
    single = [process.log_prob(schedule, i, x, out, x_next)[row] for row, i in enumerate([2, 0, 1])]
    assert torch.allclose(mixed, torch.stack(single), rtol=1e-5)
    with pytest.raises(ValueError, match="step 1 is deterministic"):
        process.log_prob_at(trainer.policy.schedule(3, "ode", 0.0), torch.tensor([1, 1, 1]), x, out, x_next)


def test_a_random_candidate_continues_and_not_the_winner(tiny_spo: Make) -> None:
    trainer = tiny_spo(steps=6, divert_start_step=0)
    races = watch_races(trainer)
    part = trainer.parts(torch.Generator().manual_seed(trainer.iteration_seed()))[0]
    roll = trainer.rollout()
    choosers, rows = [sample.generator("choice") for sample in part.noise.ids], torch.arange(4)
    won = []
    ends = [race.states_KSBCHW[0, 0] for race in races[1:]]
    for race, after in zip(races, [*ends, None], strict=True):
        chosen = torch.cat([torch.randint(3, (1,), generator=g) for g in choosers])
        if after is not None:
            assert torch.equal(race.states_KSBCHW[chosen, -1, rows], after)
        else:
            images = trainer.policy.decode(race.states_KSBCHW[chosen, -1, rows])
            assert torch.allclose(images, roll.images_B3HW, atol=1e-5)
        won += (chosen == race.score_KB.argmax(dim=0)).tolist()
    assert 0 < sum(won) < 0.6 * len(won)  # a third is expected of 24


def test_scores_are_of_x0_at_the_next_time_and_pairs_follow_them(tiny_spo: Make) -> None:
    seen: list[tuple[list[float], Tensor]] = []

    class Judge:
        def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict], t_B: Tensor) -> Tensor:
            assert len(images) == len(prompts) == len(metadata) == len(t_B)
            seen.append((t_B.tolist(), images))
            return images.mean(dim=(1, 2, 3))

    trainer = tiny_spo()
    perturb(trainer)
    trainer.scorer = Judge()
    races, schedule = watch_races(trainer), trainer.sampler(trainer.config.steps)
    roll = trainer.rollout()
    assert [t for t, _ in seen] == [[float(schedule.t[2])] * 4] * 3 + [[0.0] * 4] * 3
    x = races[0].states_KSBCHW[1, -1]
    with torch.no_grad():
        out = trainer.tuned_with_cfg(x, schedule.t[2].expand(4), roll.cond)
    x0 = schedule.x0_x[2] * x + schedule.x0_out[2] * out
    assert torch.allclose(trainer.policy.decode(x0), seen[1][1], atol=1e-5)
    assert torch.allclose(trainer.policy.decode(races[1].states_KSBCHW[2, -1]), seen[5][1], atol=1e-5)
    pairs = roll.pairs
    assert pairs.step_P.tolist() == [1] * 4 + [2] * 4 and pairs.chain_P.tolist() == [0, 1, 2, 3] * 2
    for race, step in zip(races, (1, 2), strict=True):
        rows = pairs.step_P == step
        best, worst = race.score_KB.argmax(dim=0), race.score_KB.argmin(dim=0)
        chains = torch.arange(4)
        assert torch.equal(pairs.win_next_PCHW[rows], race.states_KSBCHW[best, 1, chains])
        assert torch.equal(pairs.lose_next_PCHW[rows], race.states_KSBCHW[worst, 1, chains])
        assert torch.equal(pairs.win_x_PCHW[rows], race.states_KSBCHW[0, 0])


@pytest.mark.parametrize(("family", "compare_every"), [("sd", 2), ("sdxl", 1), ("sd3", 1), ("sd3", 2)])
def test_loss_is_that_of_the_formula_under_guidance(compare_every: int, family: str, tiny_spo: Make) -> None:
    trainer = tiny_spo(family, cfg=3.0, compare_every=compare_every, num_candidates=2)
    perturb(trainer)
    roll = trainer.rollout()
    assert len(roll.pairs.step_P) == 8
    inner = roll.pairs.step_P == 2
    shared = torch.equal(roll.pairs.win_x_PCHW[inner], roll.pairs.lose_x_PCHW[inner])
    assert shared == (compare_every == 1)
    index, weight = torch.tensor([5, 2, 0]), torch.tensor([0.5, 0.3, 0.2])
    loss, _ = trainer.loss(roll, index, weight)
    expected = 0.0
    for place, w in zip(index.tolist(), weight.tolist(), strict=True):
        pairs, i = roll.pairs[torch.tensor([place])], int(roll.pairs.step_P[place])
        win = _log_ratio(trainer, roll, i, pairs.chain_P, pairs.win_x_PCHW, pairs.win_next_PCHW)
        lose = _log_ratio(trainer, roll, i, pairs.chain_P, pairs.lose_x_PCHW, pairs.lose_next_PCHW)
        assert abs(win) > 1e-6
        clipped = [min(max(math.exp(r), 0.9), 1.1) for r in (win, lose)]
        expected += w * math.log(1 + math.exp(-10 * (math.log(clipped[0]) - math.log(clipped[1]))))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def _log_ratio(trainer: SPOTrainer, roll: Rollout, i: int, chain: Tensor, x: Tensor, x_next: Tensor) -> float:
    schedule, cond, logps = roll.schedule, roll.cond[chain], []
    for predict in (trainer.policy.predict, trainer.policy.reference):
        both = [predict(x, schedule.t[i : i + 1], c) for c in (Conditioning.cat([trainer.negative]), cond)]
        out = both[0] + 3.0 * (both[1] - both[0])
        logps.append(float(process.log_prob(schedule, i, x, out, x_next)))
    return logps[0] - logps[1]


def test_two_iterations_move_only_the_adapter(family: str, tiny_spo: Make) -> None:
    trainer = tiny_spo(family, cfg=2.0, num_candidates=2)
    frozen = {k: v.clone() for k, v in trainer.policy.network.state_dict().items() if "lora_" not in k}
    before = weights(trainer)
    rows = [trainer.iteration() for _ in range(2)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # the policy is the reference
    assert rows[0]["ratio_win"] == pytest.approx(1.0) and rows[0]["accuracy"] == pytest.approx(0.5)
    assert rows[0]["pairs"] == 8 and rows[0]["pairs_kept"] == 1 and rows[0]["updates"] == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    after = trainer.policy.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_without_a_kept_pair_there_is_no_step(tiny_spo: Make) -> None:
    trainer = tiny_spo(threshold=0.99)
    perturb(trainer)
    before = weights(trainer)
    row = trainer.iteration()
    assert row["pairs"] == row["pairs_kept"] == row["updates"] == 0 and "loss" not in row
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert trainer.state.step == 1 and math.isfinite(row["reward"]) and math.isfinite(row["preference_std"])


@pytest.mark.numerics
def test_batches_do_not_change_pairs_or_gradients(tiny_spo: Make) -> None:
    """8 pairs less the one that is not kept, in 1 pass of 8 or in 4 of 2, of which the last is padded."""
    found = []
    for size in (4, 2):
        trainer = tiny_spo(batch_size=size)
        perturb(trainer)
        roll = trainer.rollout()
        roll.pairs.kept_P[3 if size == 4 else 5] = False  # the pair of chain 3 at step 1; chains are in one order
        order = torch.argsort(roll.pairs.chain_P * 3 + roll.pairs.step_P)
        metrics = trainer.update(roll, torch.zeros(4))
        found.append((roll.pairs.win_next_PCHW[order], roll.pairs.kept_P[order], metrics, weights(trainer)))
    assert torch.equal(found[0][1], found[1][1]) and found[0][1].sum() == 7
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for name in ("loss", "grad_norm", "ratio_win", "ratio_lose", "pairs", "pairs_kept"):
        assert found[0][2][name] == pytest.approx(found[1][2][name], rel=1e-3), name
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(found[0][3], found[1][3], strict=True))


def test_updates_take_all_pairs_in_equal_parts(tiny_spo: Make) -> None:
    trainer = tiny_spo(pairs_per_update=3)
    taken, run = [], trainer.loss
    trainer.loss = lambda roll, index, w: taken.append(index[w > 0]) or run(roll, index, w)  # type: ignore
    row = trainer.iteration()
    assert row["updates"] == 3 and [len(index) for index in taken] == [3, 3, 2]
    assert sorted(torch.cat(taken).tolist()) == list(range(8))


def test_gradients_are_really_clipped(tiny_spo: Make) -> None:
    trainer = tiny_spo(max_grad_norm=1e-3)
    perturb(trainer)
    norms: list[float] = []

    def record(optimizer: torch.optim.Optimizer, *args: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    trainer.state.optimizer.optimizer.register_step_pre_hook(record)
    row = trainer.iteration()
    assert row["grad_norm"] > 0.01
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


@pytest.mark.numerics
def test_resuming_equals_an_uninterrupted_run(tiny_spo: Make, tmp_path: Path) -> None:
    options = {"save_total_limit": None, "pairs_per_update": 4, "ema_decay": 0.5}
    whole = tiny_spo(**options)
    (tmp_path / "run").mkdir()
    for _ in range(3):
        if whole.state.step == 2:
            save_checkpoint(whole.config, whole.accelerator, whole.state)
        expected = whole.iteration()
    again = tiny_spo(**options, resume=True)
    resume(again.config, again.accelerator, again.state)
    assert again.state.step == 2
    row = again.iteration()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert all(row[name] == expected[name] for name in row if not name.startswith("seconds"))


def test_a_reward_goes_up(tiny_spo: Make) -> None:
    """Brightness over noise that was not trained on, in standard errors of the mean of 24 images."""
    trainer = tiny_spo(num_prompts=3, num_generations=2, batch_size=6, lora_rank=4)
    trainer.eval_prompts = PROMPTS * 8
    before = trainer.evaluate()["eval/brightness"]
    spread = trainer.iteration()["reward_std"]
    for _ in range(4):
        trainer.iteration()
    assert trainer.evaluate()["eval/brightness"] - before > 6 * spread / math.sqrt(24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": ["r"], "num_candidates": 1}, "at least 2 candidates"),
        ({"reward": ["r"], "divert_start_step": 20}, "no step has candidates"),
        ({"reward": ["r"], "divert_end_step": 3}, "no step has candidates"),
        ({"reward": ["r"], "threshold": 1.0}, "threshold must lie"),
        ({"reward": ["r"], "epsilon": 0.0}, "epsilon must lie"),
        ({"reward": ["r"], "num_updates": 2}, "pairs_per_update"),
        ({"reward": ["r"], "num_generations": 0}, "at least 1"),
        ({"reward": ["r"], "kernel": "ode"}, "kernel must be one of"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPOConfig(**REST | options)


def test_something_judges_the_candidates() -> None:
    with pytest.raises(ValueError, match="nothing judges the candidates: give reward, or preference_model"):
        SPOConfig(**REST).check_inputs()
    SPOConfig(**REST, preference_model="spm").check_inputs()
    SPOConfig(**REST, reward=["r"]).check_inputs()
    with pytest.raises(ValueError, match="nothing to train on without prompts"):
        SPOConfig(**REST | {"prompts": None}, reward=["r"]).check_inputs()


def test_defaults_are_published() -> None:
    config = SPOConfig(**REST, preference_model="spm")
    assert (config.beta, config.epsilon, config.threshold, config.num_generations) == (10.0, 0.1, 0.3, 1)
    counts = config.derived(4)
    assert (counts["pairs_per_iteration_at_most"], counts["updates_per_iteration_at_most"]) == (640, 16)
