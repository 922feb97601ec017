"""A learned perceptual distance between images, with weights of the user's: LPIPS and its shift-tolerant form."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput

__all__ = ["HOW_TO_GET", "NAMES", "PerceptualDistance", "find_perceptual", "load_perceptual"]

# Layers in the order of the published state dicts: (channels, kernel, stride, padding) of a convolution, "relu",
# "blur", "pool" (maximum). The maps after the layers of TAPS are compared.
ALEX_TAIL = ((384, 3, 1, 1), "relu", (256, 3, 1, 1), "relu", (256, 3, 1, 1), "relu")
ALEX = ((64, 11, 4, 2), "relu", "pool", (192, 5, 1, 2), "relu", "pool", *ALEX_TAIL)
ALEX_SHIFT_TOLERANT = (
    (64, 11, 1, 2), "blur", "relu", "pool", "blur", (192, 5, 1, 2), "relu", "pool", "blur", *ALEX_TAIL,
)  # fmt: skip
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # of VGG-16: channels, convolutions
TAPS = {
    ("alex", False): (1, 4, 7, 9, 11),
    ("alex", True): (2, 6, 10, 12, 14),
    ("vgg", False): (3, 8, 15, 22, 29),
    ("vgg", True): (3, 9, 17, 25, 33),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the pixels in [-1, 1]
HUB_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
# One file each with trunk and heads, in the PyPI package stlpips_pytorch 0.0.2 (2-clause BSD)
PACKAGED = {name: f"weights/vST0.0/{name}.pth" for name in ("alex_shift_tolerant", "vgg_shift_tolerant")}
NAMES = (*HUB_FILES, *PACKAGED)
HOW_TO_GET = "pip install --no-deps stlpips_pytorch==0.0.2 has them (64 MB), or give a file"
SUFFIXES = (".pth", ".pt", ".safetensors")
KEY = re.compile(r"(?:.*\.)?(?:slice\d+|features)\.(\d+)\.(weight|bias|filt)$")
HEAD = re.compile(r"(?:.*\.)?lins?\.?(\d+)\.model\.\d+\.weight$")


class _Blur(nn.Module):
    """A depthwise binomial filter [1, 2, 1]^2 / 16 of stride 2 after reflection by two pixels."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", (line[:, None] * line).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


class PerceptualDistance(nn.Module):
    """`sum_k mean_{h,w} <w_k, (a_k(x) - a_k(y))^2>` with the maps a_k of a trunk, normalised over their channels.

    `distance(x, y)`: images (B, 1 or 3, H, W) in [-1, 1] -> the mean over the batch, a scalar.

    Args:
        trunk: `alex` or `vgg` (AlexNet, VGG-16).
        shift_tolerant: blurred in place of strided pooling.

    References:
        Zhang et al. 2018, arXiv:1801.03924; Ghildyal, Liu 2022, arXiv:2207.13686 (shift-tolerant).
    """

    shift: Tensor
    scale: Tensor
    smallest = 32  # side of an image in pixels

    def __init__(self, trunk: str = "alex", shift_tolerant: bool = False) -> None:
        super().__init__()
        self.trunk, self.shift_tolerant, self.taps = trunk, shift_tolerant, TAPS[trunk, shift_tolerant]
        layers = vgg_layers(shift_tolerant) if trunk == "vgg" else ALEX_SHIFT_TOLERANT if shift_tolerant else ALEX
        self.layers, widths = build_layers(layers, 2 if trunk == "vgg" else 3, shift_tolerant)
        self.heads = nn.ParameterList(torch.full((widths[tap],), 1.0 / widths[tap]) for tap in self.taps)
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))
        self.requires_grad_(False)

    @property
    def name(self) -> str:
        """The trunk, for the record."""
        return f"{self.trunk}, shift-tolerant" if self.shift_tolerant else self.trunk

    def check_side(self, side: int) -> None:
        """Raise BadInput for images that are too small for the trunk."""
        if side < self.smallest:
            raise BadInput(f"a perceptual distance needs images of at least {self.smallest} pixels, got {side}")

    def maps(self, x: Tensor) -> list[Tensor]:
        """The normalised maps of images."""
        x = (x.float().expand(-1, 3, -1, -1) - self.shift) / self.scale
        maps = []
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k in self.taps:
                # the root of 0 has no gradient
                maps.append(x / (x.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10))
        return maps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance, a scalar."""
        return self.by_image(x, y).mean()

    def by_image(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance of each pair, (B,)."""
        total = torch.zeros(len(y), device=y.device)
        for a, b, head in zip(self.maps(x), self.maps(y), self.heads, strict=True):
            total = total + ((a - b).square() * head.reshape(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


def vgg_layers(shift_tolerant: bool) -> list[object]:
    """The layers of VGG-16 up to its last rectifier."""
    layers: list[object] = []
    for channels, count in STAGES:
        layers += ["pool", "blur"] if layers and shift_tolerant else ["pool"] if layers else []
        for _ in range(count):
            layers += [(channels, 3, 1, 1), "relu"]
    return layers


def build_layers(specs: Sequence[object], pool: int, shift_tolerant: bool) -> tuple[nn.ModuleList, list[int]]:
    """The layers, and the channels after each."""
    channels, widths, layers = 3, [], nn.ModuleList()
    for spec in specs:
        if isinstance(spec, tuple):
            layers.append(nn.Conv2d(channels, spec[0], spec[1], spec[2], spec[3]))
            channels = spec[0]
        elif spec == "relu":
            layers.append(nn.ReLU())
        elif spec == "blur":
            layers.append(_Blur(channels))
        else:
            layers.append(nn.MaxPool2d(pool, stride=1 if shift_tolerant else 2))
        widths.append(channels)
    return layers, widths


def load_perceptual(path: str | Path) -> PerceptualDistance:
    """A perceptual distance with the weights in a file, or in the files of a folder.

    Two layouts are read: one file with trunk (`net.slice1.0.weight`, ...) and heads (`lin0.model.1.weight`, ...), as
    the PyPI package `stlpips_pytorch` has; and a folder with the trunk as torchvision saves AlexNet or VGG-16
    (`features.0.weight`, ...) and the heads as the PyPI package `lpips` has them.

    Args:
        path: a `.pth`, `.pt` or `.safetensors` file, or a folder of them.

    Raises:
        BadInput: if it is none of these, or several distances: then name one file.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in SUFFIXES)
    if not path.exists():
        raise BadInput(f"LPIPS: there is no file or folder {path}; by name its trunks are {', '.join(NAMES)}")
    if not files:
        raise BadInput(f"{path} holds no weights of a perceptual distance ({', '.join(SUFFIXES)})")
    return from_files(files, path)


def find_perceptual(name: str) -> PerceptualDistance | None:
    """LPIPS by the name of its trunk, from the files that other packages have left on this machine.

    The trunk of `alex` and `vgg` is looked for where torch hub keeps it, `checkpoints/alexnet-owt-7be5be79.pth` or
    `checkpoints/vgg16-397923af.pth`, the heads in the package `lpips`, which is not imported, and beside the trunk
    as `lpips_alex.pth` or `lpips_vgg.pth`. The shift-tolerant ones are whole in the package `stlpips_pytorch`, which is
    not imported either.

    Args:
        name: `alex`, `vgg`, `alex_shift_tolerant` or `vgg_shift_tolerant`.

    Returns:
        The distance; None where a file is missing.

    Raises:
        BadInput: for another name.
    """
    if name in PACKAGED:
        file = package_file("stlpips_pytorch", PACKAGED[name])
        return None if file is None else from_files([file], file)
    if name not in HUB_FILES:
        raise BadInput(f"LPIPS has the trunks {', '.join(NAMES)}, found {name!r}")
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    places = (checkpoints / f"lpips_{name}.pth", package_file("lpips", f"weights/v0.1/{name}.pth"))
    trunk = checkpoints / HUB_FILES[name]
    heads = next((place for place in places if place is not None and place.is_file()), None)
    if heads is None or not trunk.is_file():
        return None
    return from_files([trunk, heads], checkpoints)


def package_file(package: str, path: str) -> Path | None:
    """A file of an installed package, which is not imported; None where it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / path
    return file if file.is_file() else None


def from_files(files: Sequence[Path], path: Path) -> PerceptualDistance:
    """`load_perceptual` from files; `path` is what messages name."""
    trunks: dict[Path, dict[tuple[int, str], Tensor]] = {}
    heads: dict[Path, dict[int, Tensor]] = {}
    for file in files:
        state = read_state(file)
        trunk = {(int(m[1]), m[2]): value for key, value in state.items() if (m := KEY.match(key))}
        head = {int(m[1]): value for key, value in state.items() if (m := HEAD.match(key))}
        trunks |= {file: trunk} if trunk else {}
        heads |= {file: head} if head else {}
    if len(trunks) > 1:
        names = " and ".join(file.name for file in trunks)
        raise BadInput(f"{path} holds several perceptual distances, {names}: give one of the files")
    if not trunks or not heads:
        missing = "trunk (net.slice1.0.weight or features.0.weight)" if not trunks else "heads (lin0.model.1.weight)"
        raise BadInput(f"{path}: no {missing} of a perceptual distance in {', '.join(file.name for file in files)}")
    (file, trunk), *_ = trunks.items()
    first = trunk.get((0, "weight"))
    sides = {11: "alex", 3: "vgg"}
    if first is None or first.ndim != 4 or first.shape[-1] not in sides:
        raise BadInput(f"{file}: the trunk is neither AlexNet nor VGG-16")
    distance = PerceptualDistance(sides[first.shape[-1]], any(name == "filt" for _, name in trunk))
    fitting = [one for one in heads.values() if head_widths(one) == [len(h) for h in distance.heads]]
    if len(fitting) != 1:
        raise BadInput(f"{path}: {len(fitting)} sets of heads fit the trunk {distance.trunk} of {file.name}, not one")
    with torch.no_grad():
        for name, tensor in (*distance.layers.named_parameters(), *distance.layers.named_buffers()):
            number, _, kind = name.partition(".")
            value = trunk.get((int(number), kind))
            if value is None or value.shape != tensor.shape:
                raise BadInput(f"{file}: layer {number} has no {kind} of shape {tuple(tensor.shape)}")
            tensor.copy_(value)
        for k, head in enumerate(distance.heads):
            head.copy_(fitting[0][k].flatten())
    return distance.eval()


def head_widths(heads: dict[int, Tensor]) -> list[int]:
    """The channels that each head weighs, in order."""
    return [heads[k].numel() for k in sorted(heads)]


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict in a file. Raises BadInput if it cannot be read."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises various exceptions for damaged files
        raise BadInput(f"cannot read the weights {file} ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise BadInput(f"{file} holds no state dict")
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
