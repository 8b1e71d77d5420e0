"""The doubles of torch's products, and the settings of `make test-cpus`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlg.models.adapter_files import NAME
from rlg.models.policy import Policy
from tests.support import cpus, perturbed_kernels

ROWS, FEWER = 6, 2
SEEDED = torch.Generator().manual_seed(0)
TOKENS = torch.randn(ROWS, 5, 24, generator=SEEDED)
WEIGHT = torch.randn(48, 24, generator=SEEDED)
BIAS = torch.randn(48, generator=SEEDED)
IMAGES = torch.randn(ROWS, 8, 6, 6, generator=SEEDED)
KERNEL = torch.randn(16, 8, 3, 3, generator=SEEDED)
HEADS = torch.randn(ROWS, 2, 5, 16, generator=SEEDED)


def gradient(rows: int) -> Tensor:
    """Of each row's own loss."""
    inputs = TOKENS[:rows].clone().requires_grad_()
    functional.linear(inputs, WEIGHT).square().sum().backward()
    return inputs.grad


PRODUCTS: dict[str, Callable[[int], Tensor]] = {
    "linear": lambda rows: functional.linear(TOKENS[:rows], WEIGHT, BIAS),
    "linear without bias": lambda rows: functional.linear(TOKENS[:rows], WEIGHT),
    "matmul": lambda rows: TOKENS[:rows, 0] @ WEIGHT.T,
    "bmm": lambda rows: torch.bmm(TOKENS[:rows], TOKENS[:rows].mT),
    "baddbmm": lambda rows: torch.baddbmm(TOKENS[:rows, :, :5], TOKENS[:rows], TOKENS[:rows].mT, beta=0.5),
    "conv2d": lambda rows: functional.conv2d(IMAGES[:rows], KERNEL, padding=1),
    "attention": lambda rows: functional.scaled_dot_product_attention(HEADS[:rows], HEADS[:rows], HEADS[:rows]),
    "backward": gradient,
}


@pytest.fixture
def double(request: pytest.FixtureRequest) -> Iterator[None]:
    library = perturbed_kernels.install(request.param)
    yield
    library._destroy()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("double", ["by_rows"], indirect=True)
def test_a_row_depends_on_the_number_of_rows_by_some_ulps(double: None, name: str) -> None:
    whole, part = PRODUCTS[name](ROWS)[:FEWER], PRODUCTS[name](FEWER)
    assert not torch.equal(whole, part)
    assert torch.equal(part, PRODUCTS[name](FEWER))  # the same shapes: the same result
    torch.testing.assert_close(whole, part, rtol=1e-6, atol=1e-4 if name == "backward" else 1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("double", ["row_by_row"], indirect=True)
def test_the_control_computes_each_row_alone(double: None, name: str) -> None:
    assert torch.equal(PRODUCTS[name](ROWS)[:FEWER], PRODUCTS[name](FEWER))


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "backward"])
def test_the_perturbation_is_one_ulp_up_down_or_none(name: str) -> None:
    plain = PRODUCTS[name](ROWS)
    library = perturbed_kernels.install("by_rows")
    moved = PRODUCTS[name](ROWS)
    library._destroy()
    up, down = (torch.nextafter(plain, torch.full_like(plain, sign * torch.inf)) for sign in (1, -1))
    for neighbours in (up, down, plain):
        assert (moved == neighbours).any()
    assert ((moved == up) | (moved == down) | (moved == plain)).all()
    assert torch.equal(PRODUCTS[name](ROWS), plain)  # and now the machine's own kernels again


@pytest.mark.parametrize("double", ["by_rows"], indirect=True)
def test_a_product_of_zeros_is_zero(double: None) -> None:
    assert not functional.linear(TOKENS, torch.zeros_like(WEIGHT)).any()


@pytest.mark.parametrize("double", ["by_rows"], indirect=True)
def test_other_threads_and_lora_layers_meet_the_double_too(double: None, tiny_policy: Callable[..., Policy]) -> None:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(PRODUCTS["linear"](ROWS)[:FEWER]))
    thread.start()
    thread.join()
    assert not torch.equal(found[0], PRODUCTS["linear"](FEWER))
    low, high = (
        next(module for name, module in tiny_policy("sd3").network.named_modules() if name.endswith(f"{end}.{NAME}"))
        for end in ("lora_A", "lora_B")
    )
    rows = torch.randn(ROWS, low.in_features, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(high(low(rows))[:FEWER], high(low(rows[:FEWER])))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "sve256"])
def test_every_pair_of_settings_is_run(capability: str) -> None:
    values = cpus.factors(capability)
    runs = cpus.covering(values)
    for one, other in itertools.combinations(values, 2):
        met = {(setting[one], setting[other]) for setting in runs}
        assert met == set(itertools.product(values[one], values[other]))
    assert len(runs) <= {"avx512": 7, "avx2": 6}.get(capability, 5)
    assert {setting["ATEN_CPU_CAPABILITY"] for setting in runs} <= {"default", "avx2", capability}
