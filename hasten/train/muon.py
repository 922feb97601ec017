"""Muon: momentum with orthogonalised updates of matrices, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate `U V^T` of each `g = U S V^T` by a quintic Newton-Schulz iteration.

    It runs in bfloat16 on accelerators, and in float32 on CPUs, many of which only emulate bfloat16 (3 times slower).

    `X <- a X + (b A + c A A) X, A = X X^T` with (a, b, c) = (3.4445, -4.7750, 2.0315), which moves the singular
    values of `g / |g|` to within about [0.7, 1.2] in five steps.

    Args:
        g: matrices (..., m, n).
        steps: of the iteration.

    Returns:
        The matrices (..., m, n), in the dtype of `g`.

    References:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.float() if g.device.type == "cpu" else g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """One optimiser for a whole network: Muon on its hidden matrices and kernels, AdamW on the rest.

    A kernel `(out, in, k, k)` is taken as the matrix `(out, in k k)`. Its step is
    `w <- (1 - lr wd) w - lr max(1, out / (in k k))^(1/2) orthogonalize(g + mu m)`, `m <- mu m + (1 - mu) g`
    with Nesterov momentum. `torch.optim.Muon` takes matrices only, hence this one.

    Args:
        matrices: the weights that Muon trains, of two dimensions or more.
        others: the weights that AdamW trains (embeddings, first and last layer, vectors).
        lr: Muon's learning rate.
        momentum: Muon's.
        adam_lr: AdamW's learning rate.
        betas: AdamW's.
        weight_decay: decoupled, of both.

    Raises:
        ValueError: if one of `matrices` is a vector.

    References:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        adam_lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
    ) -> None:
        flat = [tuple(p.shape) for p in matrices if p.ndim < 2]
        if flat:
            raise ValueError(f"Muon trains matrices and kernels, not parameters of shape {flat[0]}")
        common = {"momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__(
            [{"params": matrices, "lr": lr, "muon": True}, {"params": others, "lr": adam_lr, "muon": False}], common
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have gradients once. closure: evaluates the loss, which is returned."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            if active:
                (self._muon if group["muon"] else self._adamw)(active, group)
        return loss

    def _muon(self, active: list[Tensor], group: dict[str, Any]) -> None:
        """Muon's update of parameters that have gradients."""
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in active:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        for (rows, columns), same in shapes.items():  # equal shapes are iterated as one batch
            grads = [p.grad for p in same if p.grad is not None]
            momenta = [self.state[p]["momentum"] for p in same]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
            steps = orthogonalize(torch.stack([u.flatten(1) for u in ahead])).unbind()
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, [u.view_as(p) for u, p in zip(steps, same, strict=True)], alpha=-rate)

    def _adamw(self, active: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW's update of parameters that have gradients."""
        for p in active:
            if "step" not in self.state[p]:
                self.state[p] |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        n, (b1, b2) = self.state[active[0]]["step"], group["betas"]
        grads = [p.grad for p in active if p.grad is not None]
        means, squares = [self.state[p]["mean"] for p in active], [self.state[p]["square"] for p in active]
        torch._foreach_lerp_(means, grads, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - b2)
        scale = torch._foreach_sqrt(torch._foreach_div(squares, 1 - b2**n))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_mul_(active, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(active, means, scale, value=-group["lr"] / (1 - b1**n))


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the parameters of `module` into those for Muon and those for AdamW.

    Hidden matrices and kernels are for Muon; embeddings, vectors, and the first and last layer (named `conv_in`,
    `conv_out`) are for AdamW, as Muon's authors advise.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        edge = any(part in ("conv_in", "conv_out") for part in name.split("."))
        (others if p.ndim < 2 or edge or id(p) in embeddings else matrices).append(p)
    return matrices, others
