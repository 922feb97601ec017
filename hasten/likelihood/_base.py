"""What the methods of likelihood share: their result, and data of a number of levels.

Images of K levels are `e_k = 2 k / (K - 1) - 1`, k = 0 .. K - 1, as hasten reads them, and each stands for the bin of
width `2 / (K - 1)` around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import BadInput
from ..predictions import precise
from ..schedules.base import Schedule
from ..utils.random import Noise

__all__ = ["Likelihood", "bits_per_dim", "decoder_log_probability", "dequantise", "gaussian_bin_log_probability"]

NOISIEST = -10.0  # lam at which the bounds begin where a schedule ends at pure noise: what is left out is < 1e-8 D nats
CHUNK = 2**22  # values of the K-level decoder at a time


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihoods.

    Args:
        nats: (B,) float64: of discrete data `-log P`, or an upper bound of it; of continuous data `-log p`.
        parts: terms of a bound that sum to it, each (B,).
        nfe: evaluations of the network for each sample.
    """

    nats: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    nfe: int = 0


def bits_per_dim(nats: Tensor, dimensions: int) -> Tensor:
    """`nats / (D log 2)`."""
    return nats / (dimensions * math.log(2))


def check_levels(levels: int | None) -> None:
    """Raise BadInput unless a number of levels is None or at least 2."""
    if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 2):
        raise BadInput(f"levels is the number of values of a pixel, at least 2, such as 256, found {levels!r}")


def level_indices(x: Tensor, levels: int) -> Tensor:
    """The levels k (B, *S) int64 of data in [-1, 1].

    Raises:
        BadInput: where the data have other values than `levels` equally spaced ones.
    """
    place = (x.double().cpu() + 1) * (0.5 * (levels - 1))
    k = place.round()
    # uint8 copies of data with fewer levels are off by up to half a grey level
    if bool(((place - k).abs() > 1e-3 + (levels - 1) / 500).any()) or bool(((k < 0) | (k > levels - 1)).any()):
        worst = float(x.flatten()[int((place - k).abs().flatten().argmax())])
        raise BadInput(f"the data are not of {levels} levels in [-1, 1], found the value {worst:g}: set levels")
    return k.long()


def dequantise(k: Tensor, levels: int, u: Tensor) -> Tensor:
    """Levels k (B, *S) spread uniformly over their bins, `(2 (k + u) - 1) / (K - 1) - 1`, u (B, *S) in [0, 1); float64.

    `log P(k) >= E_u log p(x) + D log(2 / (K - 1))`.

    References:
        Theis, van den Oord, Bethge 2016, arXiv:1511.01844.
    """
    return (2 * (k.double() + u.double()) - 1) / (levels - 1) - 1


def decoder_log_probability(z: Tensor, k: Tensor, levels: int, q: Tensor | float) -> Tensor:
    """`log p(k | z)`, (B, *S) float64, `p = softmax_k(-(z - e_k)^2 / (2 q^2))`.

    Args:
        z: noisy data divided by alpha (B, *S).
        k: levels (B, *S).
        levels: K.
        q: noise level sigma / alpha, ().

    References:
        Kingma, Salimans, Poole, Ho 2021, arXiv:2107.00630, section 3.3.
    """
    z, q = precise(z), torch.as_tensor(q)
    width = 2 / (levels - 1)
    # levels further than 20 q from the nearest one have no weight
    reach = min(math.ceil(20 * float(q.detach()) / width) + 1, levels - 1)
    nearest = ((z.detach() + 1) / width).round().clamp(0, levels - 1)
    offsets = torch.arange(-reach, reach + 1, device=z.device, dtype=z.dtype)
    flat, middle, own = z.flatten(), nearest.flatten(), k.flatten().to(z)
    size = max(CHUNK // len(offsets), 1)
    pieces = []
    for part, centre, index in zip(flat.split(size), middle.split(size), own.split(size)):
        near = centre[:, None] + offsets
        logits = -((part[:, None] - (near * width - 1)) ** 2) / (2 * q**2)
        logits = logits.masked_fill((near < 0) | (near > levels - 1), -math.inf)
        pieces.append(-((part - (index * width - 1)) ** 2) / (2 * q**2) - logits.logsumexp(1))
    return torch.cat(pieces).reshape(z.shape)


def gaussian_bin_log_probability(mean: Tensor, std: Tensor | float, k: Tensor, levels: int) -> Tensor:
    """`log` of the mass of N(mean, std^2) in the bin of level k, (B, *S) float64; the outer bins are open.

    References:
        Ho, Jain, Abbeel 2020, arXiv:2006.11239, equation 13.
    """
    mean = mean.double()
    std = torch.as_tensor(std, dtype=torch.float64, device=mean.device)
    k = k.to(mean.device)
    centre = 2 * k.double() / (levels - 1) - 1
    above, below = ((centre + sign / (levels - 1) - mean) / std for sign in (1, -1))
    # of a bin on the upper side the complements are subtracted, which does not cancel
    flip = below > 0
    high, low = torch.where(flip, -below, above), torch.where(flip, -above, below)
    first, last = k == 0, k == levels - 1
    log_high = torch.special.log_ndtr(high)
    log_low = torch.special.log_ndtr(low)
    inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-300)))
    inside = torch.where(first, torch.special.log_ndtr(above), inside)
    return torch.where(last, torch.special.log_ndtr(-below), inside)


def check_schedule(schedule: Schedule, t_min: float | None) -> tuple[float, float]:
    """The first and last time of a likelihood, of a schedule of the usual form.

    Raises:
        BadInput: for another forward process, and a `t_min` outside (0, t_max).
    """
    if not schedule.ordinary:
        raise BadInput(
            f"the likelihood is defined here for x_t = alpha x + sigma eps, and this model's process is "
            f"{type(schedule).__name__}"
        )
    start = schedule.t_min if t_min is None else float(t_min)
    if not 0 < start < schedule.t_max:
        raise BadInput(f"t_min must lie between 0 and {schedule.t_max:g}, found {start:g}")
    return start, schedule.t_max


def uniforms(seeds: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Noise]:
    """Numbers in [0, 1) for each seed, (B, *shape) float64, and the noise of the same seeds that follows them.

    Both depend on the seed of their sample alone, so that two models are compared with the same numbers.
    """
    noise = Noise(seeds, shape)
    return torch.special.ndtr(noise().double()).clamp(max=1 - 1e-9), noise
