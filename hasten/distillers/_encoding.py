"""DDIM run upwards, from the image to the noise, and what a student that jumps far upwards has to say.

A step from t to s > t with the noise e that is said at z_t is, r = alpha_s / alpha_t,

    z_s = r z_t + (sigma_s - r sigma_t) e

After several steps with e_1, e_2, ... the one e* that reaches the same point in a single step is their mean, weighted
by how much each step gains in noise to signal q = sigma / alpha; times alpha at the end, so that it is finite there:

    e* = sum_i alpha_end (q_{i+1} - q_i) e_i / (sigma_end - alpha_end q_start)

Upwards everything is told in e and never in x0: at t = 0 the x0 of z is z itself, and says nothing of the noise. What
a network says is e and x0 mixed, `raw = c_x x0 + c_e e`, which with z = alpha x0 + sigma e gives

    e = (alpha raw - c_x z) / (alpha c_e - sigma c_x)

finite at both ends for v, flow and edm, and for eps; for a v network on a variance-preserving schedule it is
sigma z + alpha v.

Reference: Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142, for encoders; DDIM upwards: Song,
Meng, Ermon 2021, arXiv:2010.02502; the weighted mean is an identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..inversion import eps_to_raw
from ._targets import factor


def upward_loss(student: Denoiser, z: Tensor, t: Tensor, noise: Tensor, weight: str, **cond: Any) -> Tensor:
    """The weighted squared distance of what the network says at z, t (B,) from what means `noise`, a scalar.

    weight: as in `_targets.loss`.
    """
    raw = student.raw(z, t, **cond)
    error = (raw - eps_to_raw(student, z, t, noise).to(raw.dtype)).float().square().flatten(1).mean(1)
    return (factor(student, t, weight).to(error.device, torch.float32) * error).mean()
