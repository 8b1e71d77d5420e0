"""What is said of a precision before a pipeline is loaded."""

from __future__ import annotations

import warnings

import pytest

from rlg.models import loading


@pytest.mark.parametrize(
    ("dtype", "device", "has", "told"),
    [
        ("bfloat16", "cpu", False, True),
        ("bfloat16", "cpu", True, False),
        ("float32", "cpu", False, False),
        ("bfloat16", "cuda:0", False, False),
    ],
)
def test_bfloat16_on_a_cpu_without_it_is_told(
    dtype: str, device: str, has: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_cpu_has_bfloat16", lambda: has)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loading.warn_if_emulated(dtype, device)
    assert [str(warning.message) for warning in caught] == told * [
        "this CPU only emulates bfloat16, many times slower: give --dtype float32"
    ]


def test_torch_says_if_the_cpu_has_bfloat16() -> None:
    assert loading._cpu_has_bfloat16() in (True, False)
