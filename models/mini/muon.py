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

from models.mini.device import has_bf16


def orthogonal(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """About `U V^T` of `matrix = U S V^T`, by a quintic Newton-Schulz iteration (singular values end in 0.7..1.2).

    `matrix` `[..., rows, columns]`. Rounding to bf16 disturbs it no more than its own coarseness does: it is so where
    matrices are multiplied in bf16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: torch.Tensor = matrix / (torch.linalg.matrix_norm(matrix, keepdim=True) + 1e-7)
    x = x.bfloat16() if has_bf16(x.device) else x
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


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
            if parameters:
                (self._muon if group["muon"] else self._adam)(parameters, group)

    def _muon(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Each worker orthogonalises its share of the matrices: for a small batch that is a third of the step.

        Those of one shape go together: on a GPU, else, their few thousand kernels would be most of a step.
        """
        workers = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if workers > 1 else 0
        gradients: list[torch.Tensor] = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        mine: dict[torch.Size, list[int]] = {}
        for index in range(rank, len(parameters), workers):
            mine.setdefault(parameters[index].flatten(1).shape, []).append(index)
        updates = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        pieces = torch.split(updates, [p.numel() for p in parameters])
        for shape, alike in mine.items():
            matrices = torch.stack(
                [gradients[i].lerp(momenta[i], group["momentum"]).flatten(1) for i in alike]  # Nesterov
            )
            made = orthogonal(matrices) * (0.2 * max(shape) ** 0.5)
            torch._foreach_copy_([pieces[i] for i in alike], list(made.flatten(1)))
        if workers > 1:
            dist.all_reduce(updates)
        shaped = [piece.view_as(parameter) for parameter, piece in zip(parameters, pieces, strict=True)]
        torch._foreach_add_(parameters, shaped, alpha=-group["lr"])

    def _adam(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state.update(step=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
            state["step"] += 1
        states = [self.state[p] for p in parameters]
        gradients, (beta1, beta2) = [p.grad for p in parameters if p.grad is not None], group["betas"]
        firsts, seconds = ([state[name] for state in states] for name in ("first", "second"))
        torch._foreach_lerp_(firsts, gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        first = torch._foreach_div(firsts, [1 - beta1 ** state["step"] for state in states])
        second = torch._foreach_div(seconds, [1 - beta2 ** state["step"] for state in states])
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, 1e-8)
        torch._foreach_addcdiv_(parameters, first, second, -group["lr"])


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
