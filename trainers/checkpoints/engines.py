"""Engines of accelerate that share training state out: DeepSpeed's ZeRO, and FSDP2.

ZeRO-2 gives each process a part of the optimizer's state, and ZeRO-3 a part of every parameter, too. FSDP2 gives it a
part of the frozen base; the LoRA stays whole on every process. All differences from plain training are in this module.
Elsewhere, parameters are read and written within `whole`, the optimizer's state goes through `optimizer_state` and
`load_optimizer_state`, a loss through `share`, and gradients through `average_gradients`. Checkpoints hold whole
tensors, so another engine, or another number of processes, can resume them.

Every process calls `whole`, the two functions of the optimizer's state and `average_gradients`: they are collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations import unset_hf_deepspeed_config

_SLOTS = ("exp_avg", "exp_avg_sq")  # values that AdamW keeps of a parameter, besides the number of steps


def make_accelerator(mixed_precision: str, **options: Any) -> Accelerator:
    """accelerate's `Accelerator` for the engine that it was launched with.

    Raises ValueError for mixed precision under DeepSpeed, and for FSDP without a GPU.
    """
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and mixed_precision != "no":
        raise ValueError(
            f"mixed_precision is {mixed_precision}, with which DeepSpeed rounds the LoRA, too; "
            "give --mixed_precision no (the base keeps its own dtype)"
        )
    if not torch.accelerator.is_available():
        # Processes on the CPU find each other, by gloo, only if PartialState is told so; else each would believe it is
        # alone. The Accelerator is not told, because it would then leave DeepSpeed out.
        PartialState(cpu=True)
    if deepspeed:
        _no_compiler()
    _forget_precision(mixed_precision)
    accelerator = Accelerator(mixed_precision=mixed_precision, **options)
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not _is_fsdp(accelerator):
        raise ValueError("accelerate has FSDP on GPUs only; on CPUs launch with launch/accelerate/cpu2.yaml")
    if deepspeed:
        unset_hf_deepspeed_config()  # otherwise transformers would partition what it loads, such as text encoders
    return accelerator


def _forget_precision(mixed_precision: str) -> None:
    """Let the next `Accelerator` of this process have another precision.

    Existing ones keep their own. accelerate holds the precision once a process, and refuses another. DeepSpeed and
    FSDP hold more there, which can be set only once a process.
    """
    state = AcceleratorState._shared_state
    plain = PartialState._shared_state.get("distributed_type") not in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if plain and state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._shared_state = type(state)()


def require_scaler(accelerator: Accelerator, dtype: str) -> None:
    """Raise ValueError for a trained float16 network without a loss scaler.

    Without it, most of the gradient is rounded to 0. accelerate has a scaler with mixed_precision fp16, on GPUs.
    DeepSpeed has one in its own fp16 engine; that engine also rounds the LoRA, so `make_accelerator` refuses it.
    """
    if dtype != "float16" or (accelerator.scaler is not None and accelerator.scaler.is_enabled()):
        return
    scaled = accelerator.device.type != "cpu" and not is_deepspeed(accelerator)
    fix = "--mixed_precision fp16, which scales the loss, or --dtype bfloat16" if scaled else "--dtype bfloat16"
    raise ValueError(
        f"dtype is float16 and nothing scales the loss, so that most of the gradient is rounded to 0; give {fix}"
    )


def _no_compiler() -> None:
    """Keep DeepSpeed from compiling a collective at its start on the CPU.

    Only inference uses that collective.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def require_plain(accelerator: Accelerator, what: str) -> None:
    """Raise ValueError under DeepSpeed, for a training that it cannot do."""
    if is_deepspeed(accelerator):
        raise ValueError(
            f"DeepSpeed cannot train {what}; launch with another file, such as launch/accelerate/8gpu.yaml"
        )


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Tell whether DeepSpeed takes the optimizer's steps."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure(accelerator: Accelerator, network: nn.Module, batch_size: int, max_grad_norm: float) -> None:
    """Tell the engine the training config, before `accelerator.prepare`.

    Raises ValueError for FSDP 1.
    """
    if is_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = batch_size
        settings["train_batch_size"] = batch_size * accelerator.num_processes
        # the number of passes changes between iterations, so `share` divides
        settings["gradient_accumulation_steps"] = 1
        settings["gradient_clipping"] = max_grad_norm
    elif _is_fsdp(accelerator):
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version is {plugin.fsdp_version}; give 2, as launch/accelerate/fsdp2.yaml does")
        lora = (".lora_A", ".lora_B")
        plugin.ignored_modules = [module for name, module in network.named_modules() if name.endswith(lora)]


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over all processes under FSDP2.

    FSDP2 leaves this to us, because the LoRA is whole everywhere.
    """
    if _is_fsdp(accelerator):
        for parameter in parameters:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")


def _is_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def share(accelerator: Accelerator, loss: Tensor) -> Tensor:
    """The loss for `accelerator.backward`.

    accelerate divides it by the passes of a step, except under DeepSpeed. There, this function divides.
    """
    return loss / accelerator.gradient_accumulation_steps if is_deepspeed(accelerator) else loss


@contextmanager
def whole(parameters: Sequence[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Make parameters whole on every process for the block.

    With `write`, the changes of the first process stay. They change the network's computation; the optimizer steps
    from its own values until `load_optimizer_state`.
    """
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
            yield
    else:
        yield


def shapes(parameters: Sequence[nn.Parameter]) -> list[tuple[int, ...]]:
    """Shapes of the whole parameters."""
    return [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters]


def optimizer_state(optimizer: Any, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """torch's `state_dict` of the optimizer, whole.

    Its keys are places in the list of parameters.
    """
    zero = _zero_of(optimizer, parameters)
    if zero is None:
        return optimizer.state_dict()
    from deepspeed.utils import safe_get_full_optimizer_state

    inner, state = zero.optimizer, {}
    steps = [slots["step"] for slots in inner.state.values() if "step" in slots]
    for i, parameter in enumerate(parameters if steps else ()):  # there is no state before the first step
        slots = {name: safe_get_full_optimizer_state(parameter, name) for name in _SLOTS}
        state[i] = {"step": torch.as_tensor(steps[0]).cpu().clone()} | slots
    groups = [{name: value for name, value in group.items() if name != "params"} for group in inner.param_groups]
    return {"state": state, "param_groups": [group | {"params": list(range(len(parameters)))} for group in groups]}


def load_optimizer_state(optimizer: Any, parameters: Sequence[nn.Parameter], state: dict[str, Any]) -> None:
    """Restore `optimizer_state`, after the parameters.

    From here on the optimizer steps from the values of the parameters. Under ZeRO the options of the groups stay as
    they are.
    """
    zero = _zero_of(optimizer, parameters)
    if zero is None:
        optimizer.load_state_dict(state)
        return
    rows = state["state"]
    if rows:
        _allocate(zero, rows[0]["step"])
    with whole(parameters):
        values = [parameter.detach().clone() for parameter in parameters]
    for i, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        _set_part(parameter, value)
        for name in _SLOTS if rows else ():
            _set_part(parameter, rows[i][name].to(value.device), name)


def _zero_of(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Any:
    """DeepSpeed's optimizer around torch's; None where there is none."""
    sharded = any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in parameters)
    return optimizer.optimizer if sharded else None


def _allocate(zero: Any, step: Tensor) -> None:
    """Allocate the state that AdamW allocates in its first step."""
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    for flat in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
        zero.optimizer.state[flat] = {"step": step.clone()} | {name: torch.zeros_like(flat) for name in _SLOTS}
    if not stage3:
        zero._lazy_init_hp_params_optimizer_state()


def _set_part(parameter: nn.Parameter, value: Tensor, slot: str | None = None) -> None:
    """Set this process's part of a value of the optimizer.

    The value is the one from which the optimizer steps or, with `slot`, one of AdamW's averages.
    """
    from deepspeed import comm, utils

    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(value, slot)
        return
    size = parameter.ds_tensor.numel()  # the last part is padded
    start = size * comm.get_rank(parameter.ds_process_group)
    part = pad(value.flatten(), (0, max(0, start + size - value.numel())))[start : start + size]
    if slot is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, slot)
