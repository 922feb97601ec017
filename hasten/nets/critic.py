"""Critics: discriminators of real and generated samples, from scratch or on the features of a frozen denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .joint import with_source, with_source_shape
from .layers import TimeFeatures, group_norm, zero

LAST = ("conv_out", "out", "proj_out", "proj_out_2", "final")  # attribute names of the last layer of a network


class Condition(nn.Module):
    """A critic's embedding (B, width) of the time t, () or (B,) in [0, 1], the class, (B,) or None, and the text.

    Args:
        classes: 0 for none; label `classes` is the null class, and `label=None` is the null class for all.
        width: even.
        text: D of `pooled_text`, 0 for none.
    """

    def __init__(self, classes: int, width: int, text: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.time = nn.Sequential(
            TimeFeatures(width, 20.0), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.text = nn.Sequential(nn.LayerNorm(text), nn.Linear(text, width)) if text else None

    def forward(self, n: int, t: Tensor | float, label: Tensor | None = None, **cond: Tensor) -> Tensor:
        """The embedding of n samples."""
        device = next(self.parameters()).device
        if not isinstance(t, Tensor):
            t = torch.full((n,), float(t), device=device)
        emb = self.time(t.to(device, torch.float32).expand(n))
        if self.text is not None and (pooled := pooled_text(cond)) is not None:
            emb = emb + self.text(pooled)
        if self.label is None:
            return emb
        if label is None:
            label = torch.full((n,), self.classes, dtype=torch.long, device=device)
        return emb + self.label(label)


def pooled_text(cond: Mapping[str, Tensor]) -> Tensor | None:
    """The text of a batch as one vector a sample, float32 (B, D): the mean over the tokens of `text` (B, L, E), beside
    the text encoder's own pooled embedding where there is one (`added_text_embeds`); None without text.
    """
    parts = []
    if (text := cond.get("text")) is not None:
        weights = torch.ones(text.shape[:2], device=text.device) if cond.get("text_mask") is None else cond["text_mask"]
        weights = weights.float()[..., None]
        parts.append((text.float() * weights).sum(1) / weights.sum(1).clamp_min(1))
    if (pooled := cond.get("added_text_embeds")) is not None:
        parts.append(pooled.float())
    return torch.cat(parts, 1) if parts else None


def text_width(cond: Mapping[str, Tensor] | None) -> int:
    """D of `pooled_text` for these conditions, 0 without text."""
    pooled = None if cond is None else pooled_text(cond)
    return 0 if pooled is None else pooled.shape[1]


class FeatureHeads(nn.Module):
    """One convolutional head per feature map: `[(B, C_k, h_k, w_k), ...], t, (B,) -> logits (B, M)`.

    A head is a 4x4 convolution of stride 2, GroupNorm and SiLU, h of `width` channels, and the map of logits

        logit = conv3x3(h) + <P c, h> / sqrt(width)                  c: embedding of time and class

    M is the total number of pixels of the maps.

    Args:
        channels: C_k of each map.
        classes: 0 for none.
        width: even.
        text: D of `pooled_text`, 0 for none.

    References:
        Miyato, Koyama 2018, arXiv:1802.05637 (the projection); Sauer et al. 2024, arXiv:2403.12015 (heads on a
        diffusion network's features).
    """

    def __init__(self, channels: Sequence[int], classes: int = 0, width: int = 64, text: int = 0) -> None:
        super().__init__()
        self.condition = Condition(classes, width, text)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 4, stride=2, padding=1), group_norm(width), nn.SiLU()) for c in channels
        )
        self.out = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for _ in channels)
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in channels)

    def forward(
        self, features: Sequence[Tensor], t: Tensor | float, label: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """Logits (B, M)."""
        c = self.condition(len(features[0]), t, label, **cond)
        logits = []
        for feature, body, out, project in zip(features, self.body, self.out, self.project, strict=True):
            h = body(feature if feature.itemsize >= 4 else feature.float())  # features in half precision
            projection = (project(c)[:, :, None, None] * h).sum(1, keepdim=True) / math.sqrt(h.shape[1])
            logits.append((out(h) + projection).flatten(1))
        return torch.cat(logits, 1)


class PointCritic(nn.Module):
    """A perceptron for points: `[(B, D_k), ...], t, (B,) -> logits (B, 1)`; also takes one tensor (B, *S).

    Args:
        size: D = sum D_k.
        classes: 0 for none.
        width: of its three layers, even.
        spectral: every layer has spectral norm 1, which bounds the gradient of the critic in x. Without it the squares
            of x are inputs too: they reveal first that generated samples have too little variance, as those of few
            denoising steps do.
        text: D of `pooled_text`, 0 for none.

    References:
        Miyato et al. 2018, arXiv:1802.05957 (spectral normalisation).
    """

    def __init__(self, size: int, classes: int = 0, width: int = 128, spectral: bool = False, text: int = 0) -> None:
        super().__init__()
        self.condition = Condition(classes, width, text)
        self.squares = not spectral
        in_features = size * (1 + self.squares)
        layers = [nn.Linear(in_features, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)]
        self.layers = nn.ModuleList(spectral_norm(layer) if spectral else layer for layer in layers)
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(
        self, x: Tensor | Sequence[Tensor], t: Tensor | float, label: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """Logits (B, 1)."""
        x = x.flatten(1) if isinstance(x, Tensor) else torch.cat([part.flatten(1) for part in x], 1)
        c = self.condition(len(x), t, label, **cond)
        x = torch.cat([x, x * x], 1) if self.squares else x
        first, *hidden, last = self.layers
        h = F.leaky_relu(first(x.to(c.dtype)), 0.2)
        for layer, project in zip(hidden, self.project, strict=True):
            h = F.leaky_relu(layer(h) + project(c), 0.2)
        return last(h)


class ConvCritic(nn.Module):
    """A convolutional critic trained from scratch: `[(B, C_k, H, W), ...], t, (B,) -> logits (B, 1)`.

    4x4 convolutions of stride 2 with leaky rectifiers and the condition as a shift after each, then the mean over the
    map. Also takes one tensor. No batch statistics, so that gradient penalties are independent between samples.

    Args:
        channels: sum C_k.
        classes: 0 for none.
        widths: of the convolutions; the side of the image must be at least 2^len(widths).
        spectral, text: as in `PointCritic`.
    """

    def __init__(
        self,
        channels: int,
        classes: int = 0,
        widths: Sequence[int] = (32, 64, 128),
        spectral: bool = False,
        text: int = 0,
    ) -> None:
        super().__init__()
        emb = widths[-1]
        self.condition = Condition(classes, emb, text)
        in_channels = [channels, *widths[:-1]]
        convs = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(in_channels, widths, strict=True)]
        self.convs = nn.ModuleList(spectral_norm(conv) if spectral else conv for conv in convs)
        self.shift = nn.ModuleList(zero(nn.Linear(emb, width)) for width in widths)
        self.out = spectral_norm(nn.Conv2d(emb, 1, 1)) if spectral else nn.Conv2d(emb, 1, 1)

    def forward(
        self, x: Tensor | Sequence[Tensor], t: Tensor | float, label: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """Logits (B, 1)."""
        h = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        c = self.condition(len(h), t, label, **cond)
        h = h.to(c.dtype)
        for conv, shift in zip(self.convs, self.shift, strict=True):
            h = F.leaky_relu(conv(h) + shift(c)[:, :, None, None], 0.2)
        return self.out(h).mean((2, 3))


def plain_critic(
    shape: Sequence[int], classes: int = 0, spectral: bool = False, count: int = 1, text: int = 0
) -> nn.Module:
    """A critic from scratch: convolutional for images (C, H, W), else a perceptron.

    Args:
        shape: of one sample.
        classes: 0 for none.
        spectral: with spectral normalisation.
        count: how many samples it reads together: `critic(x, t, label)` takes one tensor or a list of `count`.
        text: D of `pooled_text`, 0 for none.
    """
    if len(shape) == 3:
        levels = min(3, int(math.log2(min(shape[1:]))))
        return ConvCritic(count * shape[0], classes, (32, 64, 128)[:levels] if levels else (32,), spectral, text)
    return PointCritic(count * math.prod(shape), classes, spectral=spectral, text=text)


class Critic:
    """Logits of noisy samples, from heads on the features of a frozen denoiser's own network.

        critic(x_t (B, *S), t () or (B,), **cond) -> (B, M)      = head_logits(features(x_t, t, **cond), t, label)

    The features are the last map of each resolution of the encoder, finest first, and the middle features, from the
    network's `embed` and `encode`. Only `heads` is trained (the module to give to an optimiser); gradients pass through
    the network to x_t. For a network without these methods the features are x_t itself, with its source image where
    there is one, and the heads a critic from scratch: convolutional for images, a perceptron for points.

    Args:
        denoiser: frozen, with `net, prediction, schedule, time_input` as hasten's Denoiser.
        shape: S.
        width: of the heads.
        pair: the critic reads pairs, `critic.pair(x_s, s, x_t, t, **cond)`, the features of both concatenated.
        classes: number of labels, 0 for none. Default: that of the denoiser (`label_count`).
        cond: the network's conditions for one sample, to find the shapes of its features. Default: label 0 if there are
            classes.

    References:
        Sauer et al. 2024, arXiv:2403.12015 (the teacher's features), after Sauer et al. 2023, arXiv:2311.17042.
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
        self.has_encoder = len(shape) == 3 and all(callable(getattr(net, name, None)) for name in ("embed", "encode"))
        classes, count = label_count(denoiser) if classes is None else classes, 2 if pair else 1
        text = text_width(cond)
        self.heads: nn.Module
        if self.has_encoder:
            first = next(net.parameters())
            with torch.no_grad():
                if cond is None:
                    cond = {"label": torch.zeros(1, dtype=torch.long, device=first.device)} if classes else {}
                features = self.features(torch.zeros(1, *shape, device=first.device), 0.5, **cond)
            self.heads = FeatureHeads([count * f.shape[1] for f in features], classes, width, text).to(first.device)
        else:
            self.heads = plain_critic(with_source_shape(shape, cond), classes, count=count, text=text)

    def __call__(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """Logits (B, M) of noisy samples."""
        return self.head_logits(self.features(x_t, t, **cond), t, **cond)

    def pair(self, x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Logits (B, M) of x_s at time s as a denoised version of x_t at time t."""
        return self.head_logits(self.pair_features(x_s, s, x_t, t, **cond), t, **cond)

    def pair_features(self, x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor, **cond: Any) -> list[Tensor]:
        """The features of both samples of a pair, concatenated along the channels."""
        both = zip(self.features(x_s, s, **cond), self.features(x_t, t, **cond), strict=True)
        return [torch.cat([a, b.to(a.dtype)], 1) for a, b in both]

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> list[Tensor]:
        """The input of the heads: maps (B, C_k, h_k, w_k), or x_t itself."""
        if not self.has_encoder:
            return [with_source(x_t, cond)]
        denoiser = self.denoiser
        t = torch.as_tensor(t, dtype=torch.float64)
        c_in, _, _ = denoiser.prediction.coefficients(denoiser.schedule.alpha(t), denoiser.schedule.sigma(t))
        if c_in.ndim:
            c_in = c_in.reshape(-1, *[1] * (x_t.ndim - 1))
        time = denoiser.time_input(t).to(x_t.device, torch.float32).expand(len(x_t))
        emb = denoiser.net.embed(time, **cond)
        dtype = next((p.dtype for p in denoiser.net.parameters() if p.is_floating_point()), x_t.dtype)
        skips, middle = denoiser.net.encode((x_t * c_in.to(x_t.device, x_t.dtype)).to(dtype), emb)
        last = {tuple(skip.shape[2:]): skip for skip in skips}  # per resolution, finest first
        return [*last.values(), middle]

    def head_logits(
        self, features: Sequence[Tensor], t: Tensor | float, label: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """The heads' logits (B, M), float32 or wider."""
        logits = self.heads(features, t, label, **cond)
        return logits if logits.dtype == torch.float64 else logits.float()


def label_count(denoiser: Any) -> int:
    """The number of labels of a denoiser, 0 for none: its network's `classes`, or those below its null label.

    The null label may be any label, 0 included. A network of diffusers has `num_class_embeds` in its config.
    """
    net = getattr(denoiser, "net", denoiser)
    config: Any = getattr(net, "config", None)
    embedded = config.get("num_class_embeds") if hasattr(config, "get") else None
    known = (getattr(net, "classes", None), embedded, getattr(denoiser, "null_label", None))
    return max(count if isinstance(count, int) else 0 for count in known)


def zeroed(net: nn.Module) -> nn.Module:
    """Set the last layer of a network to zero, in place: as a critic it starts with the logit 0 everywhere.

    Args:
        net: a network, or a wrapper with the network in `net.net`, such as the adapter of a diffusers model.

    Returns:
        `net`.

    Raises:
        ValueError: if it has no last layer of a known name.
    """
    inner: nn.Module | None = net
    while inner is not None:
        for name in LAST:
            if isinstance(layer := getattr(inner, name, None), nn.Module):
                zero(layer)
                return net
        wrapped = getattr(inner, "net", None)
        inner = wrapped if isinstance(wrapped, nn.Module) else None
    raise ValueError(f"{type(net).__name__} has no last layer named {', '.join(LAST)}: use the feature heads")
