"""The difference of two networks as a LoRA: truncated singular value decompositions, with the error of what is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_int
from .lora import LowRank, innermost, target_layers

__all__ = ["Extraction", "extract_low_rank", "truncated"]


@dataclass
class Extraction:
    """A LoRA made from two networks, and what of their difference it leaves out.

    Args:
        factors: by name of the layer.
        errors: by name of the layer: `|D - B A| / |D|`, Frobenius norms, D the difference of the weights.
        lost: by name of the parameter: the norm of its change, where no LoRA of these layers can hold it (norms,
            biases, embeddings, layers that are not among the targets), zero excluded.
        total: the same relative error over all parameters: `sqrt(sum |D - B A|^2 / sum |D|^2)`, lost ones included.
        layers: the same over the layers with factors alone.
    """

    factors: dict[str, LowRank]
    errors: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    layers: float = 0.0

    def report(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {"total_error": self.total, "layers_error": self.layers, "errors": self.errors, "lost": self.lost}


def truncated(difference: Tensor, rank: int) -> tuple[LowRank, float]:
    """The best approximation of rank r (Eckart-Young): `D = U S V^T`, `B = U_r sqrt(S_r)`, `A = sqrt(S_r) V_r^T`.

    Args:
        difference: D, (out, in) or (out, in, kh, kw), which is decomposed as (out, in kh kw).
        rank: r; factors of lower full rank are padded with zeros.

    Returns:
        The factors, with a scale of 1, and the norm of what is left out, `sqrt(sum of S_k^2, k > r)`.
    """
    matrix = difference.detach().cpu().double().flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    count = min(rank, len(s))
    root = s[:count].sqrt()
    up, down = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    up[:, :count], down[:count] = u[:, :count] * root, root[:, None] * vh[:count]
    spatial = difference.shape[2:]
    factors = LowRank(
        down.float().reshape(rank, *difference.shape[1:]),
        up.float().reshape(-1, rank, *[1] * len(spatial)),
        float(rank),
    )
    return factors, float(s[count:].square().sum().sqrt())


def extract_low_rank(
    base: nn.Module, student: nn.Module, rank: int, targets: str | Sequence[str] | None = "all"
) -> Extraction:
    """The LoRA that makes of one network another of the same shape, as far as its rank allows.

    Args:
        base: the network without.
        student: the network with it.
        rank: r of every layer; at most the full rank of the largest layer.
        targets: the layers, see `hasten.nets.lora.target_layers`.

    Raises:
        BadInput: for networks of different shapes, and two that are equal.

    References:
        Eckart, Young 1936; the use for LoRAs is that of kohya's `extract_lora_from_models`.
    """
    rank = check_int("the rank of a LoRA", rank, 1)
    base, student = innermost(base), innermost(student)
    before, after = dict(base.named_parameters()), dict(student.named_parameters())
    if different := sorted(before.keys() ^ after.keys()):
        raise BadInput(f"the networks have different weights, first {different[0]}: a LoRA needs two of one shape")
    for name, value in before.items():
        if value.shape != after[name].shape:
            raise BadInput(
                f"the networks have different weights: {name} is {tuple(value.shape)} in the base and "
                f"{tuple(after[name].shape)} in the student"
            )
    layers = target_layers(base, targets)
    weights = {f"{name}.weight": name for name in layers}
    rank = min(rank, max(min(w.shape[0], w[0].numel()) for name, w in before.items() if name in weights))
    result = Extraction({})
    held = left = lost = 0.0  # sums of squares: of the layers' differences, of what their factors leave out, of others
    for name, value in before.items():
        difference = after[name].detach().cpu().double() - value.detach().cpu().double()
        if not (norm := float(difference.norm())):
            continue
        if name not in weights:
            result.lost[name] = norm
            lost += norm**2
            continue
        result.factors[weights[name]], rest = truncated(difference, rank)
        result.errors[weights[name]] = rest / norm
        held, left = held + norm**2, left + rest**2
    if not result.factors:
        raise BadInput("the weights of both networks are equal in all layers that a LoRA would change")
    result.layers, result.total = math.sqrt(left / held), math.sqrt((left + lost) / (held + lost))
    return result
