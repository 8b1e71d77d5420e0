"""Memory of a training, counted from config files alone.

Nothing is downloaded, run or held.

    weights      parameters and buffers of the pipeline's modules, in their dtypes, on the meta device
    LoRA         float32; its gradient, each of AdamW's two averages and each copy (moving average, old) are as large
    activations  an estimate: the peak of what tensors hold in one forward and backward pass of the denoiser, with its
                 batch, resolution, guidance and checkpointing, on tensors without contents
                 (`rlg.benchmark.live_memory`)
    decoding     an estimate: the same of the autoencoder, for a batch of images

Activations and decoding take turns, so the larger one counts. Rewards, kernels' workspaces, kept text encodings,
memory that an allocator holds back and torch.compile are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlg.benchmark import live_memory
from rlg.diffusion.conditioning import Conditioning
from rlg.models import hub, skeleton
from rlg.models.policy import Policy
from trainers.core.config import RunConfig, TrainConfig

GIB = 2**30
_SLOTS = 2  # averages that AdamW keeps of a parameter
_LOGGERS = (diffusers.utils.logging, transformers.utils.logging)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """Bytes of a process that shares nothing."""

    denoiser: int
    text_encoders: int
    autoencoder: int
    other_parts: int
    lora: int
    lora_copies: int
    gradient: int
    optimizer: int
    activations: int
    decoding: int

    @property
    def total(self) -> int:
        """Sum of everything; of activations and decoding, the larger."""
        taken = sum(vars(self).values()) - self.activations - self.decoding
        return taken + max(self.activations, self.decoding)

    def sharded(self, engine: str, processes: int) -> int:
        """Total of a process whose engine shares its parts out.

        See `trainers.checkpoints.engines`.
        """
        return self.total - sum(size - size // processes for size in (vars(self)[name] for name in SHARED[engine]))


SHARED = {  # parts that an engine shares out
    "data parallel": (),
    "ZeRO-2": ("gradient", "optimizer"),
    "ZeRO-3": ("denoiser", "lora", "gradient", "optimizer"),
    "FSDP2": ("denoiser",),
}


def lines(config: RunConfig, processes: int) -> Iterator[str]:
    """Yield the lines about memory that `--dry_run` prints."""
    if not isinstance(config, TrainConfig):
        yield "memory: not counted for the training of a scorer"
        return
    with _quiet():
        try:
            policy = skeleton.load(config.base, config.dtype, config.t5_length, config.vae_dtype)
        except OSError as error:
            if not hub.is_id(config.base):
                raise
            reason = str(error).split("\n")[0]
            yield f"memory: not known, the config files of {config.base} are not on this machine ({reason})"
            return
        plan = plan_of(policy, config)
    yield "memory of a process in GiB; activations and decoding are estimates, rewards are not counted"
    yield from (f"{name}: {size / GIB:.3g}" for name, size in vars(plan).items() if size)
    for engine in SHARED if processes > 1 else ("data parallel",):
        where = f" (each of {processes} processes, {engine})" if processes > 1 else ""
        yield f"total{where}: {plan.sharded(engine, processes) / GIB:.3g}"


def plan_of(policy: Policy, config: TrainConfig) -> Plan:
    """Count the memory of a training.

    The policy has no weights, and gets a LoRA. Raises ValueError for a wrong size.
    """
    denoiser = _size(policy.network)
    parts = {name: part for name, part in policy.pipe.components.items() if isinstance(part, nn.Module)}
    encoders = sum(_size(part) for name, part in parts.items() if name.startswith("text_encoder"))
    autoencoder = _size(policy.pipe.vae)
    lora = _bytes(policy.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets))
    if config.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()
    whole = denoiser + encoders + autoencoder
    return Plan(
        denoiser=denoiser,
        text_encoders=encoders,
        autoencoder=autoencoder,
        other_parts=sum(map(_size, parts.values())) - lora - whole,
        lora=lora,
        lora_copies=lora * (config.LORA_COPIES + bool(config.ema_decay)),
        gradient=lora,
        optimizer=_SLOTS * lora,
        activations=activations(policy, config),
        decoding=decoding(policy, config),
    )


def activations(policy: Policy, config: TrainConfig) -> int:
    """Peak of a forward and backward pass, in bytes."""
    with _Ones():
        count, cond = config.trained_at_once(), policy.encode([""])
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy.network.to_empty(device="cpu")
        x_BCHW = torch.empty((count, *policy.latent_shape(config.resolution)))
        t_B = torch.empty(count)
        cond = Conditioning({name: _hollow(value) for name, value in cond.tensors.items()})
    cond = cond.expand(count)
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    if config.mixed_precision in _AUTOCAST:
        precision = lambda: torch.autocast("cpu", _AUTOCAST[config.mixed_precision])  # noqa: E731

    def step() -> None:
        with precision():
            out = policy.predict(x_BCHW, t_B, cond)
        out.float().square().mean().backward()

    known = [*_tensors(policy.network), x_BCHW, t_B, *cond.tensors.values()]
    return live_memory.peak(step, known)


def decoding(policy: Policy, config: TrainConfig) -> int:
    """Peak of the decoding of a batch, in bytes."""
    vae = policy.pipe.vae
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae.to_empty(device="cpu")
        latents_BCHW = torch.empty((config.batch_size, *policy.latent_shape(config.resolution)))
    return live_memory.peak(lambda: policy.decode(latents_BCHW), [*_tensors(vae), latents_BCHW])


class _Ones(TorchDispatchMode):
    """Mode in which a tensor without values answers "true".

    A text encoder asks whether its mask is all ones.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return True
        return func(*args, **(kwargs or {}))


def _hollow(value: Tensor) -> Tensor:
    """A tensor of the meta device as a CPU tensor without contents.

    A tensor that is on the CPU already is small, and stays.
    """
    return torch.empty(value.shape, dtype=value.dtype) if value.device.type == "meta" else value


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _size(module: nn.Module) -> int:
    return _bytes(_tensors(module))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries silent for the block.

    They would warn of a pipeline that is not meant to run.
    """
    before = [logger.get_verbosity() for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, level in zip(_LOGGERS, before, strict=True):
            logger.set_verbosity(level)
