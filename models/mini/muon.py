"""Muon for weight matrices and convolutions, AdamW for the rest, in one optimizer.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal
matrix. The update is scaled to AdamW's usual size (Liu et al., 2025, arXiv:2502.16982, eq. 4), so that one learning
rate serves both. On the bundled VAE it needs less than half of AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.mini.mixed import has_bf16


def orthogonal(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """About `U V^T` of `matrix = U S V^T`, by a quintic Newton-Schulz iteration (singular values end in 0.7..1.2).

    Rounding to bf16 disturbs it no more than its own coarseness does: it is so where the CPU multiplies in bf16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: torch.Tensor = matrix / (matrix.norm() + 1e-7)
    x = x.bfloat16() if has_bf16() else x
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """`matrices` are updated by Muon, `others` by AdamW without weight decay."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "muon": True},
            {"params": list(others), "muon": False},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(parameters, group)
            else:
                for parameter in parameters:
                    self._adam(parameter, group)

    def _muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Each worker orthogonalises its share of the matrices: for a small batch that is a third of the step."""
        workers = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if workers > 1 else 0
        updates = torch.zeros(sum(p.numel() for p in parameters))
        pieces = torch.split(updates, [p.numel() for p in parameters])
        for index, (parameter, piece) in enumerate(zip(parameters, pieces, strict=True)):
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            if index % workers == rank:
                matrix = gradient.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov
                piece.copy_((orthogonal(matrix) * (0.2 * max(matrix.shape) ** 0.5)).flatten())
        if workers > 1:
            dist.all_reduce(updates)
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.sub_(piece.view_as(parameter), alpha=group["lr"])

    def _adam(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
        state["step"] += 1
        gradient, (beta1, beta2) = parameter.grad, group["betas"]
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first = state["first"] / (1 - beta1 ** state["step"])
        second = state["second"] / (1 - beta2 ** state["step"])
        parameter.addcdiv_(first, second.sqrt().add_(1e-8), value=-group["lr"])


def split(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as Muon's matrices and the rest: biases, gains, tables and embeddings."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        embeddings = {p for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for parameter in module.parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and parameter not in embeddings and min(parameter.flatten(1).shape) > 1
                table = parameter.ndim == 3  # a transformer's scale and shift table
                (matrices if matrix and not table else others).append(parameter)
    return matrices, others
