"""The plain reference and every cut of the trainer: the same loss and gradient. And the measuring itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewards import RewardMix
from rlg.benchmark import flops
from rlg.benchmark.allocations import peak_allocated
from rlg.benchmark.phases import REST, Phases
from rlg.diffusion.conditioning import Conditioning
from rlg.models.policy import Policy
from rlg.models.prompt_cache import EncodedPrompts
from tests.conftest import PROMPTS
from tests.support.smooth_rewards import brightness
from tests.trainers.test_grpo import ADVANTAGE, Make, applied_gradients, move, spy
from trainers.benchmark import grpo
from trainers.benchmark.grpo import PHASES, MeasuredTrainer, samples_of
from trainers.benchmark.plain_grpo import PlainGRPO
from trainers.grpo import GRPOConfig, GRPOTrainer, Pass

TOLERANCE = 2e-4  # of a gradient's norm: sums in another order


def config(**options: Any) -> GRPOConfig:
    tiny = {
        "base": "-",
        "name": "run",
        "reward": ["brightness"],
        "prompts": "-",
        "num_prompts": 2,
        "num_generations": 2,
        "batch_size": 2,
        "steps": 3,
        "ema_decay": 0.0,
        "max_grad_norm": 1e9,
    }
    return GRPOConfig(**tiny | options)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("cfg", "beta", "scale"), [(2.0, 0.5, "group"), (1.0, 0.0, "batch")])
def test_trainer_and_plain_reference_agree(
    family: str, cfg: float, beta: float, scale: str, tiny_policy: Callable[..., Policy]
) -> None:
    policy, mix = tiny_policy(family), RewardMix({"brightness": brightness}, (1.0,))
    options = config(cfg=cfg, beta=beta, scale_rewards=scale)
    trainer = MeasuredTrainer(options, policy, mix, PROMPTS)
    plain = PlainGRPO(options, policy, mix, PROMPTS, Phases())
    batches, schedule, steps = samples_of(trainer)
    table = plain.sample(batches, schedule)
    images = table.pop("image_B3HW")
    roll = trainer.rollout()
    torch.testing.assert_close(images, roll.images_B3HW, rtol=0, atol=1e-4)
    table["advantage_B"] = plain.advantages(batches, images)
    torch.testing.assert_close(table["advantage_B"], trainer.score(roll)[0], rtol=0, atol=1e-2)
    loss = plain.accumulate(table, schedule, steps)
    expected = torch.cat([p.grad.flatten() for p in policy.trainable()])
    plain.optimizer.zero_grad()
    with applied_gradients(trainer) as found:
        metrics = trainer.update(roll, table["advantage_B"])
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-6)
    assert expected.norm() > 0 and far(found[0], expected) < TOLERANCE


@pytest.mark.parametrize(("cfg", "beta"), [(1.0, 0.0), (1.0, 0.5), (2.0, 0.0), (2.0, 0.5)])
def test_the_reference_runs_what_the_public_scripts_run(
    cfg: float, beta: float, tiny_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 images in 3 steps, of which 2 are trained: both branches only under CFG, and the base only for a KL."""
    policy, mix, rows = tiny_policy("sd3"), RewardMix({"brightness": brightness}, (1.0,)), {"tuned": 0, "base": 0}

    def counted(name: str, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *rest: Any) -> Tensor:
            rows[name] += len(x)
            return inner(x, *rest)

        return call

    options = config(cfg=cfg, beta=beta)
    work = samples_of(MeasuredTrainer(options, policy, mix, PROMPTS))
    plain = PlainGRPO(options, policy, mix, PROMPTS, Phases())
    monkeypatch.setattr(policy, "predict", counted("tuned", policy.predict))
    monkeypatch.setattr(policy, "reference", counted("base", policy.reference))
    plain.iteration(*work)
    branches = 1 if cfg == 1 else 2
    assert rows == {"tuned": branches * 4 * (3 + 2), "base": branches * 4 * 2 if beta else 0}


def test_an_iteration_of_the_reference_moves_the_weights(tiny_policy: Callable[..., Policy]) -> None:
    policy, mix = tiny_policy("sd3"), RewardMix({"brightness": brightness}, (1.0,))
    plain = PlainGRPO(config(), policy, mix, PROMPTS, Phases())
    before = torch.cat([p.detach().flatten().clone() for p in policy.trainable()])
    seconds = plain.phases.whole(lambda: plain.iteration(*samples_of(MeasuredTrainer(config(), policy, mix, PROMPTS))))
    assert seconds.keys() == {*PHASES, REST}
    assert (torch.cat([p.flatten() for p in policy.trainable()]) - before).abs().max() > 1e-4


def update_gradient(trainer: GRPOTrainer, advantage: Tensor = ADVANTAGE) -> Tensor:
    """Of an update on a rollout of the moved policy."""
    move(trainer)
    roll = trainer.rollout()
    with applied_gradients(trainer) as found:
        trainer.update(roll, advantage)
    return found[0]


@pytest.mark.parametrize(("size", "seen"), [(None, [4, 4]), (1, [1] * 8), (2, [2] * 4), (8, [8])])
def test_passes_of_any_size_give_one_gradient(
    size: int | None, seen: list[int], family: str, tiny_trainer: Make
) -> None:
    options = {"beta": 1.0, "max_grad_norm": 1e9, "skip_last_step": True}
    expected = update_gradient(tiny_trainer(family, **options))
    trainer, rows = tiny_trainer(family, update_batch_size=size, **options), []
    move(trainer, 0.0)
    trainer.base_with_cfg = spy(trainer.base_with_cfg, lambda x, t, cond: rows.append(len(x)))
    assert far(update_gradient(trainer), expected) < TOLERANCE
    assert rows == seen


def test_sizes_of_passes_that_do_not_fit_are_refused(tiny_trainer: Make) -> None:
    with pytest.raises(ValueError, match="update_batch_size = 3 must divide batch_size = 4"):
        tiny_trainer("sd3", update_batch_size=3)
    with pytest.raises(ValueError, match="takes 2 steps of a batch at once, which do not divide the 3"):
        tiny_trainer("sd3", update_batch_size=8, steps=4)
    with pytest.raises(ValueError, match="update_batch_size must be positive, got 0"):
        tiny_trainer("sd3", update_batch_size=0)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_samples_without_an_advantage_get_no_pass_and_change_nothing(size: int, tiny_trainer: Make) -> None:
    advantage = torch.tensor([1.0, -0.5, 0.0, 0.0])
    trainer, rows = tiny_trainer("sd3", update_batch_size=size, max_grad_norm=1e9), []
    trainer.trained_with_cfg = spy(trainer.trained_with_cfg, lambda x, t, cond: rows.append(len(x)))
    roll = trainer.rollout()
    rows.clear()
    with applied_gradients(trainer) as found:
        metrics = trainer.update(roll, advantage)
    assert rows == {2: [2, 1, 2, 1], 4: [2, 2], 8: [4]}[size]
    whole = tiny_trainer("sd3", max_grad_norm=1e9)
    terms = [whole.pass_loss(roll, Pass(0, (i,), 0, len(advantage)), advantage) for i in roll.train_steps]
    loss = sum(term for term, _ in terms) / len(terms)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, whole.policy.trainable())])
    assert far(found[0], expected) < TOLERANCE
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_an_update_without_any_advantage_is_zero_and_cheap(tiny_trainer: Make) -> None:
    trainer, rows = tiny_trainer("sd3"), []
    roll = trainer.rollout()
    trainer.trained_with_cfg = spy(trainer.trained_with_cfg, lambda x, t, cond: rows.append(len(x)))
    with applied_gradients(trainer) as found:
        metrics = trainer.update(roll, torch.zeros(4))
    assert rows == [1, 1] and not found[0].any() and metrics["loss"] == 0


def test_a_kl_is_of_every_sample(tiny_trainer: Make) -> None:
    trainer, rows = tiny_trainer("sd3", beta=1.0), []
    roll = trainer.rollout()
    trainer.trained_with_cfg = spy(trainer.trained_with_cfg, lambda x, t, cond: rows.append(len(x)))
    trainer.update(roll, torch.zeros(4))
    assert rows == [4, 4]


def test_inner_epochs_share_the_outputs_of_the_base(tiny_trainer: Make) -> None:
    found = []
    for shared in (True, False):
        trainer, calls = tiny_trainer("sd3", beta=1.0, num_iterations=3, batch_size=2), []
        trainer.base_with_cfg = spy(trainer.base_with_cfg, lambda *_, calls=calls: calls.append(1))
        roll = trainer.rollout()
        if not shared:
            inner = trainer.pass_loss
            trainer.pass_loss = spy(inner, lambda roll, *_: roll.references.clear())
        metrics = trainer.update(roll, ADVANTAGE)
        assert len(calls) == (4 if shared else 12)  # 2 batches of 2 steps
        found.append((metrics, torch.cat([p.flatten() for p in trainer.policy.trainable()])))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    once = tiny_trainer("sd3", beta=1.0)
    roll = once.rollout()
    once.update(roll, ADVANTAGE)
    assert not roll.references  # nothing is held that is not met again


def test_prompts_are_encoded_once_and_the_oldest_are_dropped() -> None:
    asked: list[str] = []

    def encode(prompts: list[str]) -> Conditioning:
        asked.extend(prompts)
        return Conditioning({"x": torch.tensor([[float(len(p))] * 4 for p in prompts])})

    encoded = EncodedPrompts(encode, limit=40)  # two of 16 bytes
    assert encoded(["a", "bb", "a"]).tensors["x"][:, 0].tolist() == [1, 2, 1]
    assert asked == ["a", "bb"] and encoded.bytes == 32
    encoded(["a"])
    encoded(["ccc"])  # drops bb, which was asked for before a
    assert encoded.bytes == 32
    encoded(["a", "ccc", "bb"])
    assert asked == ["a", "bb", "ccc", "bb"]


def test_training_meets_a_prompt_again_without_encoding_it(tiny_trainer: Make) -> None:
    trainer, asked = tiny_trainer("sd3", num_prompts=3, batch_size=2), []
    trainer.encoded.encode = spy(trainer.encoded.encode, asked.extend)
    trainer.iteration()
    trainer.iteration()
    assert sorted(asked) == sorted(p.text for p in PROMPTS)


def test_a_compiled_network_keeps_its_names(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", compile=True)
    assert trainer.policy.network._compiled_call_impl is not None
    assert not [name for name, _ in trainer.policy.network.named_parameters() if "_orig_mod" in name]
    assert tiny_trainer("sd3", name="other").policy.network._compiled_call_impl is None


def test_phases_are_exclusive_and_add_up_to_the_whole() -> None:
    now = [0.0]
    phases = Phases(clock=lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    inner = phases.wrap("inner", spend)

    def run() -> None:
        spend(1)
        with phases("outer"):
            spend(2)
            inner(4)
            spend(8)
        inner(16)

    spend(32)
    assert phases.whole(run) == {REST: 1, "outer": 10, "inner": 20}
    assert phases.whole(lambda: spend(3)) == {REST: 3}  # anew


def test_peak_of_allocations_is_of_those_made_within() -> None:
    held = [torch.zeros(3000, 1000)]

    def run() -> None:
        a = torch.zeros(1000, 1000)
        held.clear()  # 12 MB that were there before
        b = torch.zeros(2000, 1000)
        del a, b
        torch.zeros(1000, 1000)

    assert peak_allocated(run) == 12_000_000
    assert peak_allocated(lambda: None) == 0


def test_flops_count_products_and_attention_in_both_directions() -> None:
    a, b = torch.ones(8, 16), torch.ones(16, 32, requires_grad=True)
    assert flops.flops(lambda: a @ b) == 2 * 8 * 16 * 32
    assert flops.flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 8 * 16 * 32)  # a needs no gradient
    q = torch.ones(1, 2, 8, 4)
    assert flops.flops(lambda: scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 8 * 8 * 4)
    q.requires_grad_()
    forward_and_back = flops.flops(lambda: scaled_dot_product_attention(q, q, q).sum().backward())
    assert forward_and_back == (2 + 5) * (2 * 2 * 8 * 8 * 4)  # the scores are computed again on the way back


def test_utilisation_and_saturation_by_hand() -> None:
    assert flops.utilisation(100, 4, 50) == 0.5
    assert flops.saturates_at({1: 10.0, 2: 19.0, 4: 19.4, 8: 20.0}) == 2
    assert flops.saturates_at({1: 1.0, 2: 2.0, 4: 4.0}) == 4
    assert flops.device_seconds((1.0, 2.0), "cpu") == 2 and flops.device_seconds((1.0, 2.0), "cuda") == 1
    assert flops.matmul_peak(torch.float32, repeats=1) > 0


def test_the_command_measures_every_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num_prompts", "1", "--num_generations", "2", "--steps", "3", "--batch_sizes", "1", "2"]
    file = tmp_path / "numbers.json"
    grpo.main(["--arch", "sd15-tiny", "--device", "cpu", *sizes, "--repeats", "1", "--output", str(file)])
    rows = json.loads(file.read_text())["results"]
    names = ["plain", "trainer", "steps together", "large rollouts", "plain", "trainer", "steps together"]
    assert [row["name"] for row in rows] == names and [row["batch"] for row in rows] == [1] * 4 + [2] * 3
    for row in rows:
        assert row["phases"].keys() == {*PHASES, REST} and row["working_bytes"] > 0 and row["utilisation"] > 0
        assert (row["speedup"] is None) == (row["name"] == "plain")
    together, alone = rows[2]["working_bytes"], rows[1]["working_bytes"]
    assert together > alone  # several steps of a batch at once
    shown = capsys.readouterr().out
    assert "| large rollouts | 1 |" in shown and "trainer saturates at a batch of" in shown


@pytest.mark.parametrize("argv", [["--base", "nothing-here"], ["--dtype", "float16"], ["--num_prompts", "0"]])
def test_wrong_input_ends_in_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        grpo.main([*argv, "--device", "cpu"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
