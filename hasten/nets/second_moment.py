"""A small network that predicts the uncertainty of each pixel of a denoiser's output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ResBlock, TimeFeatures, group_norm


class SecondMoment(nn.Module):
    """`g = C / q^2` in (0, 1) for each pixel, C the variance of x given x_t.

        g = sigmoid(o(x_t, x0, lam) + 2 log alpha),     alpha^2 + sigma^2 = 1,

    where the network learns o: e^o is about the variance of the data at high noise, and at low noise g does not depend
    on it, as for data on a subspace. As E[eps^2 | x_t] = eps^2 + g, with the eps of x0, this is the second moment of
    the noise. Its inputs are x_t, x0, eps, the position of each pixel and the noise level.

    Args:
        channels: of the image.
        width: channels of the residual blocks, all at one resolution.
        blocks: number of residual blocks.
        patch: side of the space-to-depth patches; height and width must be multiples of it.
        scale: approximate standard deviation of the data.

    References:
        Bao, Li, Sun, Zhu, Zhang 2022, arXiv:2206.07309.
    """

    def __init__(self, channels: int = 1, width: int = 48, blocks: int = 3, patch: int = 2, scale: float = 0.5) -> None:
        super().__init__()
        self.config = {"channels": channels, "width": width, "blocks": blocks, "patch": patch, "scale": scale}
        self.patch, self.scale = patch, scale
        self.time = nn.Sequential(TimeFeatures(32, 100.0), nn.Linear(32, width), nn.SiLU())
        self.conv_in = nn.Conv2d((3 * channels + 2) * patch**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(width, width, width) for _ in range(blocks))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, channels * patch**2, 3, padding=1)
        for parameter, value in zip(self.conv_out.parameters(), (0.0, 2 * math.log(scale))):  # weight, bias
            nn.init.constant_(parameter, value)

    def forward(self, x_t: Tensor, x0: Tensor, lam: Tensor) -> Tensor:
        """Predict g.

        Args:
            x_t: noisy images (B, C, H, W), scaled so that alpha^2 + sigma^2 = 1.
            x0: the denoiser's output for them.
            lam: log(alpha / sigma), (B,).

        Returns:
            (B, C, H, W) float32.
        """
        lam = lam.float().to(x_t.device)
        angle = torch.atan(torch.exp(-lam.clamp(-20, 20))) * (2 / math.pi)  # 0 for data, 1 for noise
        # at low noise both images are almost equal: eps adds their difference in units of the noise
        shape = (-1, 1, 1, 1)
        sigma, alpha = torch.sigmoid(-2 * lam).sqrt().view(shape), torch.sigmoid(2 * lam).sqrt().view(shape)
        eps = (x_t - alpha * x0) / sigma.clamp(min=1e-4)
        rows, columns = (torch.linspace(-1, 1, size, device=x_t.device) for size in x_t.shape[-2:])
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x_t), -1, -1, -1)
        images = torch.cat([x_t / torch.hypot(alpha * self.scale, sigma), x0 / self.scale, eps, place], 1)
        h = self.conv_in(F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images)
        embedding = self.time(angle)
        for block in self.blocks:
            h = block(h, embedding)
        h = self.conv_out(F.silu(self.norm_out(h)))
        h = F.pixel_shuffle(h, self.patch) if self.patch > 1 else h
        return torch.sigmoid(h.float() - F.softplus(-2 * lam).view(shape))
