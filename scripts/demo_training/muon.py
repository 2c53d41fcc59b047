"""Muon (Jordan et al., 2024): momentum whose matrices are made orthogonal, here with stacks of experts at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM, DECAY, NEWTON_SCHULZ = 0.95, 0.01, (3.4445, -4.7750, 2.0315)


def orthogonal(x: Tensor) -> Tensor:
    """Roughly U V^T of each matrix U S V^T of x [..., rows, columns], by five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For the matrices between embeddings and head. A fused gate and up projection counts as two matrices."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], lr: float) -> None:
        named = list(named)
        super().__init__([weight for _, weight in named], {"lr": lr})
        self.fused = {id(weight) for name, weight in named if name.endswith("gate_up_proj")}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure: the loop computes the gradients
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - MOMENTUM)
                direction = weight.grad.lerp(buffer, MOMENTUM)
                rows, columns = weight.shape[-2:]
                if id(weight) in self.fused:  # gate_up_proj [E, 2F, H]
                    rows //= 2
                direction = orthogonal(direction.unflatten(-2, (-1, rows))).view_as(weight)
                weight.mul_(1 - group["lr"] * DECAY)
                weight.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
