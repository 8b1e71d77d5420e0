"""Published architectures: the real ones have the published number of weights, and the tiny ones run."""

from __future__ import annotations

import pytest
import torch

from rlg.benchmark.architectures import ARCHITECTURES, random_policy
from rlg.models.backbones import backbone_of

TINY = [name for name in ARCHITECTURES if name.endswith("-tiny")]
# of the published files: the network's weights (SD3.5's file also holds its 384 x 384 position embedding, a buffer)
WEIGHTS = {"sd35-medium": 2_243_171_520, "sd15": 859_520_964, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_real_ones_have_the_published_number_of_weights(name: str) -> None:
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    network = SD3Transformer2DModel if name.startswith("sd35") else UNet2DConditionModel
    with torch.device("meta"):
        made = network(**ARCHITECTURES[name].denoiser)
    assert sum(p.numel() for p in made.parameters()) == WEIGHTS[name]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_one_has_the_keys_of_the_real_one_and_runs(name: str) -> None:
    tiny, real = ARCHITECTURES[name], ARCHITECTURES[name.removesuffix("-tiny")]
    assert set(tiny.denoiser) - {"norm_num_groups"} == set(real.denoiser)
    assert len(tiny.clips) == len(real.clips) and (tiny.t5 is None) == (real.t5 is None)
    policy = random_policy(name, lora_rank=2)
    cond = policy.encode(["a red circle", ""])
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    t_B = torch.full((2,), 500.0)
    with torch.no_grad():
        base, tuned = policy.reference(x, t_B, cond), policy.predict(x, t_B, cond)
        assert policy.decode(x).shape == (2, 3, 128, 128)
        again = random_policy(name, lora_rank=2).predict(x, t_B, cond)
    assert base.isfinite().all() and base.std() > 1e-3
    assert (tuned - base).abs().max() > 1e-4  # the LoRA is not zero
    assert torch.equal(tuned, again)
    assert backbone_of(policy.pipe) is policy.backbone


def test_the_third_text_encoder_is_real_or_collapsed() -> None:
    def tokens(t5: bool) -> int:
        return (
            random_policy("sd35-medium-tiny", t5=t5).encode(["a red circle"]).tensors["encoder_hidden_states"].shape[1]
        )

    assert (tokens(True), tokens(False)) == (77 + 256, 77 + 1)


def test_precision_and_the_callers_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    policy = random_policy("sd15-tiny", dtype="bfloat16")
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_default_dtype() is torch.float32
    assert policy.network.conv_in.weight.dtype is policy.pipe.vae.dtype is torch.bfloat16
    assert all(parameter.dtype is torch.float32 for parameter in policy.trainable())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"arch": "sd4"}, "unknown architecture 'sd4'"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"lora_rank": 0}, "rank"),
    ],
)
def test_mistakes(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        random_policy(**{"arch": "sd15-tiny", **options})
