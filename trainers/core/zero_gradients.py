"""Share of a run's first gradient that is exactly 0.

It is large where float16 loses gradients without a loss scaler, and where a graph is cut.

    zero_gradient          of the adapter's gradient, without the factors whose gradient is 0 by construction: a LoRA
                           begins with B = 0, and the gradient of A is B^T times something
    zero_gradient_output   of the gradient that enters the network, in the network's precision, without the samples
                           that have none at all (an advantage of 0, a place that fills a batch); 1 if none has any

The gradient of weights is a sum over tokens: half of its terms may be lost while the sum is not 0. The second share
sees this. The first share sees what is lost deeper in the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

ADAPTER, OUTPUT = "zero_gradient", "zero_gradient_output"
MOST = {ADAPTER: 0.5, OUTPUT: 0.1}  # shares above which a run is warned; some layers of a network reach no output


class ZeroGradients:
    """Counter of zeros until the first update is due.

    `report` gives the shares over all processes, once.
    """

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype):
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.accelerator, self.dtype = accelerator, half.get(accelerator.mixed_precision, dtype)
        self.waiting = True
        self._counts = {OUTPUT: torch.zeros(2), ADAPTER: torch.zeros(2)}  # (zeros, total) of each

    def skip(self) -> None:
        """Count and report nothing: the run's first update was made before."""
        self.waiting, self._counts = False, {}

    def watch(self, out_BCHW: Tensor) -> None:
        """Count zeros in the gradient of a network's output, when it comes."""
        if self.waiting and out_BCHW.requires_grad:
            out_BCHW.register_hook(self._look)

    def _look(self, grad_BCHW: Tensor) -> None:
        if self.waiting:
            found_BD = grad_BCHW.detach().to(self.dtype).flatten(1) != 0
            count_B = found_BD.sum(dim=1)[found_BD.any(dim=1)]
            total = len(count_B) * found_BD.shape[1]
            self._counts[OUTPUT] += torch.tensor([total - float(count_B.sum()), total])

    def close(self, parameters: Sequence[nn.Parameter] = ()) -> None:
        """Count zeros in these parameters' gradients, then stop counting.

        Call it when the first update is due.
        """
        if self.waiting:
            for parameter in parameters:
                found = 0 if parameter.grad is None else int(parameter.grad.count_nonzero())
                self._counts[ADAPTER] += torch.tensor([parameter.numel() - found, parameter.numel()])
            self.waiting = False

    def report(self) -> dict[str, float]:
        """The shares, once, after the first update; else nothing.

        It warns where a share is large. Every process calls it, as it is collective.
        """
        if self.waiting or not self._counts:
            return {}
        device, names = self.accelerator.device, list(self._counts)
        sums = self.accelerator.reduce(torch.stack([self._counts[name] for name in names]).to(device), "sum").tolist()
        self._counts = {}
        shares = {name: zeros / total if total else 1.0 for name, (zeros, total) in zip(names, sums, strict=True)}
        if not sums[names.index(ADAPTER)][1]:
            del shares[ADAPTER]  # an engine that steps within the backward pass shows no gradient
        self._warn(shares)
        return shares

    def _warn(self, shares: dict[str, float]) -> None:
        large = {name: share for name, share in shares.items() if share > MOST[name]}
        if large and self.accelerator.is_main_process:
            said = " and ".join(f"{share:.0%} ({name})" for name, share in large.items())
            warnings.warn(
                f"{said} of the gradient of the first update is exactly 0: little or nothing is trained; half "
                "precision may round it away (--dtype bfloat16, or --mixed_precision fp16, which scales the loss)",
                stacklevel=3,
            )


def zero_share(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Share of these parameters' gradient that is exactly 0, a scalar."""
    found = sum(p.grad.count_nonzero() for p in parameters if p.grad is not None)
    return 1 - torch.as_tensor(found).float() / sum(p.numel() for p in parameters)


def dense_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Trained parameters without tables.

    A batch uses few rows of a table.
    """
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    return [p for p in network.parameters() if p.requires_grad and id(p) not in tables]


def live(network: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters of an adapter whose gradient is not 0 by construction.

    The gradient of A is 0 where B is 0.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    by_name = {names[id(parameter)]: parameter for parameter in parameters}
    second = {name: by_name.get(name.replace(".lora_A.", ".lora_B.")) for name in by_name if ".lora_A." in name}
    dead = {name for name, other in second.items() if other is not None and not bool(other.any())}
    return [parameter for name, parameter in by_name.items() if name not in dead]
