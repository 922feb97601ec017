"""Critics: networks that tell real samples from made ones, from scratch or on the features of a frozen denoiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .layers import TimeFeatures, group_norm, zero

LAST = ("conv_out", "out", "proj_out", "proj_out_2", "final")  # what the last layer of a network may be called


class Condition(nn.Module):
    """The vector (B, width) that tells a critic the time t, () or (B,) in [0, 1], and the class, (B,) or None.

    classes: 0 for none; label `classes` is "no class", and `label=None` means that for all.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.time = nn.Sequential(
            TimeFeatures(width, 20.0), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, n: int, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        weight = self.time[1].weight
        if not isinstance(t, Tensor):
            t = torch.full((n,), float(t), device=weight.device)
        emb = self.time(t.to(weight.device, torch.float32).expand(n))
        if self.label is None:
            return emb
        if label is None:
            label = torch.full((n,), self.classes, dtype=torch.long, device=weight.device)
        return emb + self.label(label)


class FeatureHeads(nn.Module):
    """One convolutional head a feature map: `[(B, C_k, h_k, w_k), ...], t, (B,) -> logits (B, M)`.

    A head is a 4x4 convolution of stride 2, GroupNorm and SiLU, h of `width` channels, and the map of logits

        logit = conv3x3(h) + <P c, h> / sqrt(width)                  c: time and class

    M is the number of all the pixels of all the maps. The inner product is the projection of Miyato, Koyama 2018,
    1802.05637; heads on a diffusion network's own features: Sauer et al. 2024, 2403.12015.

    channels: C_k of each map. classes: 0 for none. width: even.
    """

    def __init__(self, channels: Sequence[int], classes: int = 0, width: int = 64) -> None:
        super().__init__()
        self.condition = Condition(classes, width)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 4, stride=2, padding=1), group_norm(width), nn.SiLU()) for c in channels
        )
        self.out = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for _ in channels)
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in channels)

    def forward(self, features: Sequence[Tensor], t: Tensor | float, label: Tensor | None = None) -> Tensor:
        c = self.condition(len(features[0]), t, label)
        logits = []
        for feature, body, out, project in zip(features, self.body, self.out, self.project, strict=True):
            h = body(feature if feature.itemsize >= 4 else feature.float())  # of a network in half precision
            along = (project(c)[:, :, None, None] * h).sum(1, keepdim=True) / math.sqrt(h.shape[1])
            logits.append((out(h) + along).flatten(1))
        return torch.cat(logits, 1)


class PointCritic(nn.Module):
    """A perceptron for points: `[(B, D_k), ...], t, (B,) -> logits (B, 1)`; it also takes one tensor (B, *S).

    size: D = sum D_k. classes: 0 for none. width: of its three layers, even. spectral: every layer has spectral norm 1
    (Miyato et al. 2018, 1802.05957), which bounds the slope of the critic in x. Without it the squares of x are an
    input too: that made samples are too narrow, which is how a denoiser's few steps begin, shows there first.
    """

    def __init__(self, size: int, classes: int = 0, width: int = 128, spectral: bool = False) -> None:
        super().__init__()
        self.condition = Condition(classes, width)
        self.squares = not spectral
        into = size * (1 + self.squares)
        layers = [nn.Linear(into, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)]
        self.layers = nn.ModuleList(spectral_norm(layer) if spectral else layer for layer in layers)
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor | Sequence[Tensor], t: Tensor | float, label: Tensor | None = None) -> Tensor:
        x = x.flatten(1) if isinstance(x, Tensor) else torch.cat([part.flatten(1) for part in x], 1)
        c = self.condition(len(x), t, label)
        x = torch.cat([x, x * x], 1) if self.squares else x
        into, *hidden, out = self.layers
        h = F.leaky_relu(into(x.to(c.dtype)), 0.2)
        for layer, project in zip(hidden, self.project, strict=True):
            h = F.leaky_relu(layer(h) + project(c), 0.2)
        return out(h)


class ConvCritic(nn.Module):
    """A convolutional critic that learns from nothing: `[(B, C_k, H, W), ...], t, (B,) -> logits (B, 1)`.

    4x4 convolutions of stride 2 with leaky rectifiers and the condition as a shift after each, then the mean over the
    map. It also takes one tensor. No batch statistics, so that a penalty on its slope is one a sample.

    channels: sum C_k. widths: of the convolutions; the side of the image must be at least 2^len(widths).
    spectral: as in `PointCritic`.
    """

    def __init__(
        self, channels: int, classes: int = 0, widths: Sequence[int] = (32, 64, 128), spectral: bool = False
    ) -> None:
        super().__init__()
        emb = widths[-1]
        self.condition = Condition(classes, emb)
        into = [channels, *widths[:-1]]
        convs = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(into, widths, strict=True)]
        self.convs = nn.ModuleList(spectral_norm(conv) if spectral else conv for conv in convs)
        self.shift = nn.ModuleList(zero(nn.Linear(emb, width)) for width in widths)
        self.out = spectral_norm(nn.Conv2d(emb, 1, 1)) if spectral else nn.Conv2d(emb, 1, 1)

    def forward(self, x: Tensor | Sequence[Tensor], t: Tensor | float, label: Tensor | None = None) -> Tensor:
        h = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        c = self.condition(len(h), t, label)
        h = h.to(c.dtype)
        for conv, shift in zip(self.convs, self.shift, strict=True):
            h = F.leaky_relu(conv(h) + shift(c)[:, :, None, None], 0.2)
        return self.out(h).mean((2, 3))


def plain_critic(shape: Sequence[int], classes: int = 0, spectral: bool = False, count: int = 1) -> nn.Module:
    """A critic from scratch for `count` samples of `shape` side by side: convolutions for (C, H, W), else a perceptron.

    Called as `critic(x, t, label)` with one tensor or a list of `count`.
    """
    if len(shape) == 3:
        levels = min(3, int(math.log2(min(shape[1:]))))
        return ConvCritic(count * shape[0], classes, (32, 64, 128)[:levels] if levels else (32,), spectral)
    return PointCritic(count * math.prod(shape), classes, spectral=spectral)


class Critic:
    """Logits of noisy samples, from heads on what a frozen denoiser's own network sees in them.

        critic(x_t (B, *S), t () or (B,), **cond) -> (B, M)          = judge(features(x_t, t, **cond), t, label)

    The features are the last map of each resolution of the contracting half, finest first, and the middle of the
    network, through its `embed` and `encode`. Only `heads` is trained (it is the module to give to an optimiser);
    gradients pass through the network to x_t. Without that seam the features are x_t itself, and the heads a critic
    from scratch: convolutions for images, a perceptron for points.

    denoiser: frozen, with `net, prediction, schedule, time_input` as hasten's Denoiser. shape: S.
    pair: it judges pairs, `critic.pair(x_s, s, x_t, t, **cond)`: the features of both, side by side.
    classes: how many labels there are, 0 for none; None: as many as the denoiser says (`label_count`).
    cond: what the network must be told with one sample, to look at its features once; None: label 0, where there are
        classes.

    Sauer et al. 2024, 2403.12015 (the teacher's own features), after Sauer et al. 2023, 2311.17042.
    """

    def __init__(
        self,
        denoiser: Any,
        shape: Sequence[int],
        width: int = 64,
        pair: bool = False,
        classes: int | None = None,
        cond: dict[str, Tensor] | None = None,
    ) -> None:
        self.denoiser = denoiser
        net = denoiser.net if hasattr(denoiser, "net") else denoiser
        self.seam = len(shape) == 3 and all(callable(getattr(net, name, None)) for name in ("embed", "encode"))
        classes, times = label_count(denoiser) if classes is None else classes, 2 if pair else 1
        self.heads: nn.Module
        if self.seam:
            first = next(net.parameters())
            with torch.no_grad():
                if cond is None:
                    cond = {"label": torch.zeros(1, dtype=torch.long, device=first.device)} if classes else {}
                found = self.features(torch.zeros(1, *shape, device=first.device), 0.5, **cond)
            self.heads = FeatureHeads([times * f.shape[1] for f in found], classes, width).to(first.device)
        else:
            self.heads = plain_critic(shape, classes, count=times)

    def __call__(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        return self.judge(self.features(x_t, t, **cond), t, **cond)

    def pair(self, x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Logits (B, M) of x_s at s as what comes before x_t at t."""
        return self.judge(self.pair_features(x_s, s, x_t, t, **cond), t, **cond)

    def pair_features(self, x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor, **cond: Any) -> list[Tensor]:
        """The features of both samples of a pair, side by side."""
        both = zip(self.features(x_s, s, **cond), self.features(x_t, t, **cond), strict=True)
        return [torch.cat([a, b.to(a.dtype)], 1) for a, b in both]

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> list[Tensor]:
        """What the heads see: maps (B, C_k, h_k, w_k), or x_t itself."""
        if not self.seam:
            return [x_t]
        denoiser = self.denoiser
        t = torch.as_tensor(t, dtype=torch.float64)
        c_in, _, _ = denoiser.prediction.coefficients(denoiser.schedule.alpha(t), denoiser.schedule.sigma(t))
        if c_in.ndim:
            c_in = c_in.reshape(-1, *[1] * (x_t.ndim - 1))
        time = denoiser.time_input(t).to(x_t.device, torch.float32).expand(len(x_t))
        emb = denoiser.net.embed(time, **cond)
        own = next((p.dtype for p in denoiser.net.parameters() if p.is_floating_point()), x_t.dtype)
        skips, middle = denoiser.net.encode((x_t * c_in.to(x_t.device, x_t.dtype)).to(own), emb)
        last = {tuple(skip.shape[2:]): skip for skip in skips}  # of each resolution; finest first
        return [*last.values(), middle]

    def judge(self, features: Sequence[Tensor], t: Tensor | float, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The heads' logits (B, M), float32 or wider."""
        logits = self.heads(features, t, label)
        return logits if logits.dtype == torch.float64 else logits.float()


def label_count(denoiser: Any) -> int:
    """How many labels a denoiser tells apart, 0 for none: its network's `classes`, or those below its null label.

    The null label may be any of them, 0 too. A network of diffusers says `num_class_embeds` in its config.
    """
    net = getattr(denoiser, "net", denoiser)
    config: Any = getattr(net, "config", None)
    embedded = config.get("num_class_embeds") if hasattr(config, "get") else None
    known = (getattr(net, "classes", None), embedded, getattr(denoiser, "null_label", None))
    return max(count if isinstance(count, int) else 0 for count in known)


def zeroed(net: nn.Module) -> nn.Module:
    """The network with its last layer set to zero, in place: as a critic it begins with the logit 0 everywhere.

    Of a network inside another one (`net.net`, such as that of diffusers in its adapter) the inner one's is meant.
    Raises ValueError where it has no last layer of a known name.
    """
    inner: nn.Module | None = net
    while inner is not None:
        for name in LAST:
            if isinstance(layer := getattr(inner, name, None), nn.Module):
                zero(layer)
                return net
        inside = getattr(inner, "net", None)
        inner = inside if isinstance(inside, nn.Module) else None
    raise ValueError(f"{type(net).__name__} has no last layer called {', '.join(LAST)}: use the feature heads")
