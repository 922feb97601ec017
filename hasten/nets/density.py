"""A density fitted in closed form: mixtures of Gaussians along the principal directions of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.devices import has_float64


class MixtureDensity(nn.Module):
    """A normalised density on R^D for each class c: a mixture of K Gaussians in r directions, isotropic in the others.

        z = m_c + U y + s_c (1 - U U^T) e,   y ~ sum_k w_ck N(mu_ck, L_ck L_ck^T),   e ~ N(0, I)

    with an orthonormal basis U (D, r) that all classes share and a centre m_c. The buffers are float64;
    `tuning/auxiliary` fits them.

    Args:
        shape: S of a sample, D numbers.
        classes: 0 for none; label `classes` is the null class, and `label=None` is the null class for all.
        rank: r.
        components: K.
        time: of the diffusion whose z_t this is a density of.

    Raises:
        ValueError: for a rank above D.
    """

    basis: Tensor
    centre: Tensor
    weight: Tensor
    mean: Tensor
    factor: Tensor
    rest: Tensor

    def __init__(
        self, shape: Sequence[int], classes: int = 0, rank: int = 32, components: int = 1, time: float = 1.0
    ) -> None:
        super().__init__()
        D, rows = math.prod(shape), classes + 1
        if not 1 <= rank <= D or components < 1:
            raise ValueError(f"a density needs 1 <= rank <= {D} and components >= 1, got {rank} and {components}")
        self.config = {
            "shape": list(shape),
            "classes": classes,
            "rank": rank,
            "components": components,
            "time": time,
        }
        self.classes, self.time = classes, time
        eye = torch.eye(rank, dtype=torch.float64)
        self.register_buffer("basis", torch.eye(D, rank, dtype=torch.float64))
        self.register_buffer("centre", torch.zeros(rows, D, dtype=torch.float64))
        self.register_buffer("weight", torch.full((rows, components), 1 / components, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(rows, components, rank, dtype=torch.float64))
        self.register_buffer("factor", eye.repeat(rows, components, 1, 1))
        self.register_buffer("rest", torch.ones(rows, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> MixtureDensity:
        """Move as modules do, but not to a device without float64 (MPS): it stays on its device and computes there."""
        if not has_float64(fn(torch.empty(0)).device):
            return self
        return super()._apply(fn, recurse)

    def log_prob(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Log density in nats, float64 (B,), of `z` (B, *S) with labels (B,)."""
        label = self._labels(z, label)
        off = z.to(self.basis.device).double().flatten(1) - self.centre[label]
        y = off @ self.basis
        rank, D = y.shape[1], off.shape[1]
        u = torch.linalg.solve_triangular(self.factor[label], (y[:, None] - self.mean[label])[..., None], upper=False)
        log_det = self.factor[label].diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_p = torch.log(self._weights(label)) - 0.5 * u.square().sum((-2, -1)) - log_det
        residual = (off.square().sum(1) - y.square().sum(1)).clamp(min=0) / self.rest[label] ** 2
        rest = -0.5 * residual - (D - rank) * torch.log(self.rest[label])
        return torch.logsumexp(log_p, 1) + rest - 0.5 * D * math.log(2 * math.pi)

    def sample(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Draw samples as a deterministic function of noise and label.

        The component is drawn from the noise too: for its first coordinate g along U, Phi(g) is uniform. The interval
        of cumulative weights that contains it is the component, and its relative position in that interval, again
        uniform and independent of the component, is mapped back to a normal number. The distribution is exact.

        Args:
            noise: standard normal (B, *S).
            label: (B,).

        Returns:
            z (B, *S), in the dtype of the noise.
        """
        label = self._labels(noise, label)
        e = noise.to(self.basis.device).double().flatten(1)
        g = e @ self.basis
        residual = e - g @ self.basis.T
        if self.weight.shape[1] > 1:
            g = g.clone()
            weights = self._weights(label)
            upper = weights.cumsum(1)
            uniform = torch.special.ndtr(g[:, :1])
            k = (uniform >= upper[:, :-1]).sum(1)
            w, top = (v.gather(1, k[:, None]) for v in (weights, upper))
            g[:, :1] = torch.special.ndtri(((uniform - top + w) / w).clamp(1e-12, 1 - 1e-12))
        else:
            k = torch.zeros_like(label)
        y = self.mean[label, k] + torch.einsum("brs,bs->br", self.factor[label, k], g)
        z = self.centre[label] + y @ self.basis.T + self.rest[label][:, None] * residual
        return z.reshape(noise.shape).to(noise.dtype).to(noise.device)

    def _weights(self, label: Tensor) -> Tensor:
        """Mixture weights (B, K) that sum to 1."""
        weight = self.weight[label]
        return weight / weight.sum(1, keepdim=True)  # the sum is not 1 after rounding to another precision

    def _labels(self, z: Tensor, label: Tensor | None) -> Tensor:
        """The labels, or the null class for all."""
        if label is None:
            return torch.full((len(z),), self.classes, dtype=torch.long, device=self.basis.device)
        return label.to(self.basis.device)
