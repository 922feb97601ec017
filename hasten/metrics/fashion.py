"""The small classifier whose features evaluate images of 28x28 garments."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput
from .references import load_tensors

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
ZOO = Path(__file__).resolve().parent.parent / "zoo" / "fashion_features"


class _ResidualConv(nn.Module):
    """3x3 convolution, batch normalisation, ReLU; with `residual` the input is added before the ReLU."""

    def __init__(self, channels: int, out_channels: int, residual: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(x + y if self.residual else y)


class FashionClassifier(nn.Module):
    """`(B, 1 or 3, H, W)` in [-1, 1] -> features `(B, 128)` and logits `(B, 10)` over `CLASSES`.

    Five 3x3 convolutions (0.39 M weights, 22 M MACs); the features are the mean over the 7x7 map that the linear
    classifier reads, so they are non-negative and smooth in the pixels. Colour is averaged to grey; other sizes are
    resized to 28x28 (bilinear, antialiased). Trained by `recipes/fashion_features.py`, without flips: a shoe that
    points the wrong way is an error of the generator and must be visible in the features.
    """

    name = "fashion"
    width = 128
    classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ResidualConv(1, 32)
        self.second = _ResidualConv(32, 64)
        self.third = _ResidualConv(64, 128)
        self.fourth = _ResidualConv(128, 128, residual=True)
        self.fifth = _ResidualConv(128, 128, residual=True)
        self.head = nn.Linear(128, 10)

    def check(self, images: Tensor) -> None:
        """Raise BadInput for colour images `(N, 3, H, W)`: these features are of grey images only."""
        if images.shape[1] != 3:
            return
        coloured = sum(int((batch != batch[:, :1]).flatten(1).any(1).sum()) for batch in images.split(256))
        if coloured:
            raise BadInput(
                f"{coloured} of {len(images)} images are in colour, but the fashion features are for grey images only: "
                "use features=efficientnet_lite0 or inception, with a reference that was made with them"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 128)` and logits `(B, 10)`."""
        x = images.mean(dim=1, keepdim=True)
        if x.shape[-2:] != (28, 28):
            x = F.interpolate(x, size=(28, 28), mode="bilinear", antialias=True, align_corners=False)
        x = F.max_pool2d(self.stem(x), 2)
        x = F.max_pool2d(self.second(x), 2)
        features = self.fifth(self.fourth(self.third(x))).mean(dim=(2, 3))
        return features, self.head(features)


def fashion_classifier(folder: str | Path = ZOO) -> FashionClassifier:
    """Load the classifier, in evaluation mode, from fp16 to float32.

    Args:
        folder: with the weights. Default: the bundled ones.

    Raises:
        BadInput: for weights that are missing, damaged or of another network.
    """
    net = FashionClassifier()
    state = {k: v.to(torch.float32) for k, v in load_tensors(Path(folder), "weights").items()}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(
            f"{folder} does not hold the Fashion-MNIST classifier: {str(error).splitlines()[-1].strip()}"
        ) from None
    return net.eval().requires_grad_(False)
