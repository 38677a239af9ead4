"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982): momentum, orthogonalised by Newton-Schulz steps.

Hidden matrices move by ``0.2 sqrt(max(out, in)) * orthogonal(momentum)``, whose root mean square is that of AdamW's
update (arXiv 2502.16982, eq. 4), so one learning rate serves both; embeddings, heads and vectors use AdamW. A fused
projection is orthogonalised slice by slice: query, key and value are different maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from torchstone.train.optimizers import NamedParameter, OptimizerSpec, by_rate, decay_groups

__all__ = ["Muon", "MuonSpec", "orthogonal"]


class MuonSpec(OptimizerSpec):
    """Orthogonalised momentum for hidden matrices, AdamW for the rest."""

    paper: ClassVar[str] = "Liu et al. 2025, arXiv 2502.16982"

    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead along the momentum."""
    iterations: int = Field(5, ge=1, le=20)
    """Newton-Schulz steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's, for embeddings, heads and vectors."""
    eps: float = Field(1e-8, gt=0, le=1)
    """AdamW's."""

    def build(self, named: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = []
        for rate, hidden in by_rate(p for p in named if p.hidden):
            groups.append(
                {
                    "params": [p.value for p in hidden],
                    "slices": [p.slices for p in hidden],
                    "muon": True,
                    "weight_decay": self.weight_decay,
                    "peak": rate * self.lr,
                }
            )
        rest = [p for p in named if not p.hidden]
        groups += decay_groups(rest, self.weight_decay, peak=self.lr, muon=False)
        return Muon(groups, self.lr, self)


def orthogonal(g_OI: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix of `g`, roughly: singular values come to lie between 0.7 and 1.2.

    Five steps of the quintic with the coefficients of Jordan et al. 2024, in the products' type of autocast: the engine
    steps under the recipe's precision.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    kind = g_OI.device.type
    x = g_OI.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else g_OI
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(g_OI.dtype)


class Muon(torch.optim.Optimizer):
    """Groups with ``muon=True`` hold matrices and the sizes of their slices; the others are AdamW's."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, spec: MuonSpec) -> None:
        self.spec = spec
        super().__init__(groups, {"lr": lr, "muon": False, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if group["muon"]:
                    self._orthogonal_step(parameter, group, group["slices"][number])
                else:
                    self._adam_step(parameter, group)

    def _orthogonal_step(self, parameter: torch.Tensor, group: dict[str, Any], slices: tuple[int, ...]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(grad, 1 - self.spec.momentum)
        update = grad.lerp(momentum, self.spec.momentum) if self.spec.nesterov else momentum
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for part, change in zip(parameter.split(slices), update.split(slices), strict=True):
            scale = 0.2 * max(part.shape) ** 0.5
            part.add_(orthogonal(change, self.spec.iterations), alpha=-group["lr"] * scale)

    def _adam_step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        (beta1, beta2), step = self.spec.betas, state["step"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(self.spec.eps)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(state["exp_avg"] / root * (group["lr"] / (1 - beta1**step)))
