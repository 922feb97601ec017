"""Targets for a student that takes large DDIM inversion steps, from the image to the noise.

A step from t to s > t with the noise e predicted at z_t is, with r = alpha_s / alpha_t,

    z_s = r z_t + (sigma_s - r sigma_t) e

After several steps with e_1, e_2, ... the one e* that reaches the same point in a single step is their mean, weighted
by the increase of q = sigma / alpha in each step; times alpha at the end, so that it is finite there:

    e* = sum_i alpha_end (q_{i+1} - q_i) e_i / (sigma_end - alpha_end q_start)

Inversion is written in e and never in x0: at t = 0 the x0 of z is z itself, whatever the noise. The output of a network
mixes x0 and e, `raw = c_x x0 + c_e e`, which with z = alpha x0 + sigma e gives

    e = (alpha raw - c_x z) / (alpha c_e - sigma c_x)

finite at both ends for v, flow and edm, and for eps; for a v network on a variance-preserving schedule it is
sigma z + alpha v.

References:
    Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142, for encoders.
    Song, Meng, Ermon 2021, arXiv:2010.02502, for DDIM inversion. The weighted mean is an identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..inversion import eps_to_raw
from ._targets import output_weight


def upward_loss(student: Denoiser, z: Tensor, t: Tensor, noise: Tensor, weight: str, **cond: Any) -> Tensor:
    """Weighted squared error between the network's output and the one that corresponds to a noise.

    Args:
        student: in training.
        z: noised samples (B, *S).
        t: times (B,).
        noise: target (B, *S).
        weight: as in `_targets.prediction_loss`.
        cond: conditions of the network.

    Returns:
        A scalar.
    """
    raw = student.raw(z, t, **cond)
    error = (raw - eps_to_raw(student, z, t, noise).to(raw.dtype)).float().square().flatten(1).mean(1)
    return (output_weight(student, t, weight).to(error.device, torch.float32) * error).mean()
