# SPDX-License-Identifier: Apache-2.0
"""AdamW for weights and states in bf16, in which small updates are not lost to rounding."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

CHUNK_SIZE = 2**24
"""Entries of a parameter updated at once; each needs five temporary fp32 numbers."""


class AdamWBF16(torch.optim.Optimizer):
    """AdamW with all states in bf16, for parameters in bf16 (or fp32).

    Source: Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2, with Kahan's compensated summation for the weights,
    as Zamirai et al., arXiv 2010.06192, use it for training in bf16. Our deltas:

    1. All arithmetic is in fp32; only weights and states are rounded.
    2. The second moment and the compensation are rounded stochastically. Neighbouring bf16 numbers differ by 1/256 to
       1/128. With rounding to nearest, a second moment with beta_2 = 0.999, which loses 1/1000 per step, would never
       decrease, and a compensation would stop growing before it changes its weight.
    3. The random numbers of a step depend on its index alone: a resumed run repeats them, and replicas of a shard stay
       equal.

    Besides its gradient, a bf16 parameter needs 8 bytes: the weight, two moments, and the compensation, the difference
    between the exact value and the weight. An fp32 parameter needs no compensation and also 8 bytes; with
    `torch.optim.AdamW` it needs 12.

    Args:
        parameters: plain or sharded (DTensor), in bf16 or fp32.
        lr, betas, weight_decay, eps: as in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))
        # torch gives loaded states the precision of their parameter.
        self.register_load_state_dict_post_hook(_round_states)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        if parameter.dtype == torch.bfloat16 and "compensation" not in state:  # loaded states may be from fp32
            state["compensation"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        if "compensation" in state:
            tensors.append(state["compensation"])
        generator = torch.Generator(_local(parameter).device).manual_seed(step)
        for chunks in zip(*(_local(tensor).view(-1).split(CHUNK_SIZE) for tensor in tensors), strict=True):
            _update_chunk(*chunks, step=step, generator=generator, **group)


@torch.no_grad()
def settle_compensation(optimizer: torch.optim.Optimizer) -> None:
    """Adds the compensation of loaded states to weights that have none of their own.

    These are fp32 weights, which can hold the exact value, or the weights of another optimizer.
    """
    for parameter, state in optimizer.state.items():
        keeps_compensation = isinstance(optimizer, AdamWBF16) and parameter.dtype == torch.bfloat16
        if "compensation" in state and not keeps_compensation:
            _local(parameter).add_(_local(state.pop("compensation")))


def _update_chunk(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    compensation: torch.Tensor | None = None,
    *,
    step: int,
    generator: torch.Generator,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    **_: object,
) -> None:
    """One step in place; the first four or five arguments have shape (entries,)."""
    beta_1, beta_2 = betas
    gradient = gradient.float()
    first = exp_avg.float().lerp_(gradient, 1 - beta_1)
    second = exp_avg_sq.float().mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
    exp_avg.copy_(first)
    _round_stochastically(second, exp_avg_sq, generator)

    denominator = second.div_(1 - beta_2**step).sqrt_().add_(eps)
    weight = parameter.float() if compensation is None else parameter.float() + compensation.float()
    weight.mul_(1 - lr * weight_decay).addcdiv_(first, denominator, value=-lr / (1 - beta_1**step))
    parameter.copy_(weight)
    if compensation is not None:
        _round_stochastically(weight - parameter.float(), compensation, generator)


def _round_stochastically(value: torch.Tensor, out: torch.Tensor, generator: torch.Generator) -> None:
    """Rounds fp32 to bf16 stochastically, so that the expected value is exact.

    bf16 is the upper half of fp32: a random number added to the lower half carries over with that probability.
    """
    random = torch.randint(2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    out.copy_(random.add_(value.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _round_states(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step":
                state[name] = value.bfloat16()
