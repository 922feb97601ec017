"""Whether generated samples lie among one another as real ones do: structure distance with frozen random features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput
from ..nets.relation_encoder import RelationEncoder
from .features import _check_images, _pixels
from .measure import Measure

__all__ = ["random_features", "structure_distance", "structure_distance_of"]

TINY = 1e-12
BATCH = 256


def random_features(samples: Tensor, networks: int = 4, width: int = 32, seed: int = 0) -> Tensor:
    """Features of frozen networks with random weights, each of unit length: (N, *S) -> (networks, N, 128) float32.

    No network was trained, on these samples or others, so that no training can have been fitted to it.

    Args:
        samples: real or generated, floats; images in [-1, 1].
        networks: how many, each with weights of its own.
        width: of each, see `nets.relation_encoder`.
        seed: of the weights.
    """
    result = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for _ in range(networks):
            net = RelationEncoder(tuple(samples.shape[1:]), width).to(samples.device)
            result.append(torch.cat([net(batch.float()) for batch in samples.split(BATCH)]).cpu())
    return torch.stack(result)


def structure_distance(real: Tensor, generated: Tensor) -> float:
    """The distance between the laws of pairwise distances of two sets, in units of the mean distance of the real ones.

    `sqrt(mean_q (Q(q) - Q'(q))^2) / mean(Q)`, with Q and Q' the quantiles of the distances within each set, which is
    the 2-Wasserstein distance between the two laws. Samples need no counterparts in the other set. 0: pairs are as far
    from one another as in the real set; it does not see where the sets lie, as a Frechet distance does.

    Args:
        real, generated: features (N, D) and (M, D), N and M at least 2.

    Raises:
        BadInput: for fewer than two samples, or features of different lengths.

    References:
        Mémoli 2011, doi:10.1007/s10208-011-9093-5 (a lower bound of the Gromov-Wasserstein distance); Yang et al. 2024,
        arXiv:2402.17563 (relations of samples).
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise BadInput(
            f"structure distance needs features (N, D) of one D, got {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    if min(len(real), len(generated)) < 2:
        raise BadInput(f"structure distance needs 2 samples or more, got {len(real)} and {len(generated)}")
    a, b = (torch.pdist(f.double()).sort().values for f in (real, generated))
    n = min(max(len(a), len(b)), 100_000)
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    qa, qb = (quantiles(d, at) for d in (a, b))
    return float((qa - qb).square().mean().sqrt() / qa.mean().clamp_min(TINY))


def quantiles(ordered: Tensor, at: Tensor) -> Tensor:
    """The quantiles `at` in (0, 1) of increasing values, as the inverse of their distribution function."""
    return ordered[(at * len(ordered)).long().clamp_max(len(ordered) - 1)]


def structure_distance_of(
    images: Tensor, real: Tensor, samples: int = 1000, networks: int = 4, seed: int = 0, name: str = "real images"
) -> Measure:
    """Structure distance of images in frozen random features, with that between two real halves beside it.

    Args:
        images: generated (N, C, H, W), floats in [-1, 1] or uint8; `samples` of them are used.
        real: real ones of the same shape, at least 4.
        samples: maximum of each set; both get the same number.
        networks: random networks that the distance is averaged over.
        seed: of their weights.
        name: of the real ones, for the record.

    Returns:
        The mean over the networks, with its standard deviation over them, and the distance of two real sets.

    Raises:
        BadInput: for images of different shapes, and too few.
    """
    if images.shape[1:] != real.shape[1:]:
        raise BadInput(f"images have shape {tuple(images.shape[1:])}, the real ones {tuple(real.shape[1:])}")
    n = min(samples, len(images), len(real) // 2)
    if n < 2:
        raise BadInput(f"structure distance needs 2 images and 4 real ones or more, got {len(images)} and {len(real)}")
    generator = torch.Generator().manual_seed(seed)  # sets may be sorted by class
    rows, own = torch.randperm(len(real), generator=generator), torch.randperm(len(images), generator=generator)
    parts = real[rows[:n]], real[rows[n : 2 * n]], images[own[:n]]
    sets: Sequence[Tensor] = [_pixels(_check_images(part), True) for part in parts]
    first, second, generated = (random_features(part, networks, seed=seed) for part in sets)
    values = torch.tensor([structure_distance(a, b) for a, b in zip(first, generated, strict=True)])
    floors = torch.tensor([structure_distance(a, b) for a, b in zip(first, second, strict=True)])
    return Measure(
        name="structure_distance",
        value=float(values.mean()),
        features=f"{networks} random networks (seed {seed})",
        reference=name,
        count=n,
        reference_count=n,
        floor=float(floors.mean()),
        spread=float(values.std()) if networks > 1 else None,
    )
