"""The Inception-v3 network of the published Fréchet inception distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = int | tuple[int, int]


class _ConvNormReLU(nn.Module):
    """Convolution, batch normalisation (eps 1e-3), ReLU; attribute names as in the published state dict."""

    def __init__(self, channels: int, out: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, out, H', W')`."""
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Parallel branches, concatenated.

    Args:
        chains: each branch is a chain of layers by name; a tuple of names in a chain is a fork with concatenated
            outputs.
        pool: of the last branch: "avg" (padding not counted, as in TensorFlow), "max", or "reduce" (stride 2, no
            convolution after it).
        layers: the layers by name.
    """

    def __init__(self, chains: Sequence[Sequence[str | tuple[str, str]]], pool: str, **layers: _ConvNormReLU) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.chains, self.pool = chains, pool

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            y = x
            for step in chain:
                if isinstance(step, tuple):
                    y = torch.cat([self.get_submodule(name)(y) for name in step], dim=1)
                else:
                    y = self.get_submodule(step)(y)
            out.append(y)
        if self.pool == "reduce":
            out.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            out.append(self.get_submodule("branch_pool")(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            out.append(self.get_submodule("branch_pool")(pooled))
        return torch.cat(out, dim=1)


def _chain(stem: str, length: int) -> list[str | tuple[str, str]]:
    """`stem_1` to `stem_length`."""
    return [f"{stem}_{i}" for i in range(1, length + 1)]


def _along(length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a convolution along rows, and of one along columns."""
    half = length // 2
    return {"kernel": (1, length), "padding": (0, half)}, {"kernel": (length, 1), "padding": (half, 0)}


def _block_a(channels: int, pooled: int) -> _Mixed:
    """A block at 35x35 pixels."""
    return _Mixed(
        [["branch1x1"], _chain("branch5x5", 2), _chain("branch3x3dbl", 3)], "avg",
        branch1x1=_ConvNormReLU(channels, 64, 1),
        branch5x5_1=_ConvNormReLU(channels, 48, 1), branch5x5_2=_ConvNormReLU(48, 64, 5, padding=2),
        branch3x3dbl_1=_ConvNormReLU(channels, 64, 1), branch3x3dbl_2=_ConvNormReLU(64, 96, 3, padding=1),
        branch3x3dbl_3=_ConvNormReLU(96, 96, 3, padding=1),
        branch_pool=_ConvNormReLU(channels, pooled, 1),
    )  # fmt: skip


def _block_b(channels: int) -> _Mixed:
    """A block at 35x35 to 17x17 pixels."""
    return _Mixed(
        [["branch3x3"], _chain("branch3x3dbl", 3)], "reduce",
        branch3x3=_ConvNormReLU(channels, 384, 3, 2),
        branch3x3dbl_1=_ConvNormReLU(channels, 64, 1), branch3x3dbl_2=_ConvNormReLU(64, 96, 3, padding=1),
        branch3x3dbl_3=_ConvNormReLU(96, 96, 3, 2),
    )  # fmt: skip


def _block_c(channels: int, inner: int) -> _Mixed:
    """A block at 17x17 pixels."""
    row, column = _along(7)
    return _Mixed(
        [["branch1x1"], _chain("branch7x7", 3), _chain("branch7x7dbl", 5)], "avg",
        branch1x1=_ConvNormReLU(channels, 192, 1),
        branch7x7_1=_ConvNormReLU(channels, inner, 1), branch7x7_2=_ConvNormReLU(inner, inner, **row),
        branch7x7_3=_ConvNormReLU(inner, 192, **column),
        branch7x7dbl_1=_ConvNormReLU(channels, inner, 1), branch7x7dbl_2=_ConvNormReLU(inner, inner, **column),
        branch7x7dbl_3=_ConvNormReLU(inner, inner, **row), branch7x7dbl_4=_ConvNormReLU(inner, inner, **column),
        branch7x7dbl_5=_ConvNormReLU(inner, 192, **row),
        branch_pool=_ConvNormReLU(channels, 192, 1),
    )  # fmt: skip


def _block_d(channels: int) -> _Mixed:
    """A block at 17x17 to 8x8 pixels."""
    return _Mixed(
        [_chain("branch3x3", 2), _chain("branch7x7x3", 4)], "reduce",
        branch3x3_1=_ConvNormReLU(channels, 192, 1), branch3x3_2=_ConvNormReLU(192, 320, 3, 2),
        branch7x7x3_1=_ConvNormReLU(channels, 192, 1), branch7x7x3_2=_ConvNormReLU(192, 192, (1, 7), padding=(0, 3)),
        branch7x7x3_3=_ConvNormReLU(192, 192, (7, 1), padding=(3, 0)), branch7x7x3_4=_ConvNormReLU(192, 192, 3, 2),
    )  # fmt: skip


def _block_e(channels: int, pool: str) -> _Mixed:
    """A block at 8x8 pixels."""
    row, column = _along(3)
    return _Mixed(
        [
            ["branch1x1"],
            ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
            ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
        ],
        pool,
        branch1x1=_ConvNormReLU(channels, 320, 1),
        branch3x3_1=_ConvNormReLU(channels, 384, 1),
        branch3x3_2a=_ConvNormReLU(384, 384, **row), branch3x3_2b=_ConvNormReLU(384, 384, **column),
        branch3x3dbl_1=_ConvNormReLU(channels, 448, 1), branch3x3dbl_2=_ConvNormReLU(448, 384, 3, padding=1),
        branch3x3dbl_3a=_ConvNormReLU(384, 384, **row), branch3x3dbl_3b=_ConvNormReLU(384, 384, **column),
        branch_pool=_ConvNormReLU(channels, 192, 1),
    )  # fmt: skip


def resize_matrix(source: int, target: int) -> Tensor:
    """`(target, source)` matrix of TensorFlow 1's `resize_bilinear`.

    Target pixel i reads source coordinate `i * source / target` (no half-pixel centre, no antialiasing), clamped at the
    last pixel.
    """
    position = torch.arange(target, dtype=torch.float64) * (source / target)
    low = position.floor().long().clamp(max=source - 1)
    matrix = torch.zeros(target, source, dtype=torch.float64)
    rows, fraction = torch.arange(target), position - low
    matrix.index_put_((rows, low), 1 - fraction, accumulate=True)
    matrix.index_put_((rows, (low + 1).clamp(max=source - 1)), fraction, accumulate=True)
    return matrix


class Inception(nn.Module):
    """Images `(B, 1 or 3, H, W)` in [-1, 1] -> pooled features `(B, 2048)`, logits `(B, 1008)` without their bias.

    For the weights `pt_inception-2015-12-05-6726825d.pth`, the original TensorFlow weights as converted for PyTorch by
    M. Seitzer. It follows the original graph: TensorFlow 1's bilinear resize to 299x299, pixels as `(u - 128) / 128`,
    average pools that do not count padding, a max pool in the last block, and (for the inception score) logits without
    bias.

    References:
        Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500.
    """

    name = "inception"
    width = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNormReLU(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _ConvNormReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = _ConvNormReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = _ConvNormReLU(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c = _block_c(768, 128), _block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, "avg"), _block_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 2048)` and logits `(B, 1008)`."""
        x = ((images.expand(-1, 3, -1, -1) + 1) * 127.5 - 128) / 128
        if x.shape[-2:] != (299, 299):
            rows, columns = (resize_matrix(n, 299).to(x) for n in x.shape[-2:])
            x = rows @ x @ columns.T
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T
