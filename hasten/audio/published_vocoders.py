"""Published checkpoints of HiFi-GAN and Vocos."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..nets.hifigan import HiFiGAN
from ..nets.vocos import Vocos
from .mel import MelSettings

__all__ = ["published_vocoder"]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def published_vocoder(path: Path, settings: MelSettings | None = None) -> tuple[nn.Module, MelSettings]:
    """The network of a published checkpoint, and the settings of its mel spectrograms.

    Args:
        path: the file of the weights, or a folder with one and, for HiFi-GAN, its `config.json`.
        settings: for a Vocos that was trained on others than the published ones.

    Raises:
        BadInput: where there is no such checkpoint, or it does not fit.
    """
    file = weights_file(path)
    weights = read_weights(file)
    if "conv_pre.bias" in weights:
        config = file.parent / "config.json"
        if not config.is_file():
            raise BadInput(f"{file} is a HiFi-GAN, whose config.json is not beside it")
        net, settings = hifigan(config)
    elif "backbone.embed.weight" in weights:
        net, settings = vocos(weights, settings)
    else:
        raise BadInput(f"{file} is neither a HiFi-GAN (conv_pre...) nor a Vocos (backbone.embed...): {first(weights)}")
    own = net.state_dict()
    weights = {name: w for name, w in weights.items() if not BUFFERS.match(name)}
    fill_network(net, {name: w.to(own[name].dtype) if name in own else w for name, w in weights.items()}, str(file))
    return net, settings


BUFFERS = re.compile(r"feature_extractor\.|head\.istft\.window|mean$|scale$")  # computed here, or of other tools


def weights_file(path: Path) -> Path:
    """The file of the weights of a path."""
    if path.is_file():
        return path
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES or re.fullmatch(r"(g_|generator).*", p.name))
    if not files:
        raise BadInput(f"{path} holds no vocoder: neither vocoder.json nor weights ({', '.join(SUFFIXES)}, g_...)")
    return next((p for p in files if p.suffix == ".safetensors"), files[0])


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, with weight normalisation folded in: `w = g v / |v|`.

    Raises:
        BadInput: for a file that cannot be read.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # both raise various exceptions for damaged files
        raise BadInput(f"{file} cannot be read as weights ({type(e).__name__})") from e
    for name in ("generator", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(w, Tensor) for w in content.values()):
        raise BadInput(f"{file} holds no tensors by name")
    weights: dict[str, Tensor] = {}
    for name, w in content.items():
        name = name.removeprefix("module.").replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v").replace("upsampler.", "ups.")
        weights[name] = w
    for name in [name for name in weights if name.endswith(".weight_g")]:
        stem = name.removesuffix("_g")
        g, v = weights.pop(name), weights.pop(f"{stem}_v", None)
        if v is None:
            raise BadInput(f"{file} has {name} without {stem}_v")
        weights[stem] = torch._weight_norm(v.float(), g.float(), 0)
    return weights


def hifigan(config: Path) -> tuple[nn.Module, MelSettings]:
    """The network and settings of a HiFi-GAN's config.json."""
    try:
        c = json.loads(config.read_text(encoding="utf-8"))
        net = HiFiGAN(
            c.get("num_mels", c.get("model_in_dim", 80)), c["upsample_initial_channel"], c["upsample_rates"],
            c["upsample_kernel_sizes"], c["resblock_kernel_sizes"], c["resblock_dilation_sizes"],
            str(c.get("resblock", "1")),
        )  # fmt: skip
        rate = int(c.get("sampling_rate", 22050))
        settings = MelSettings(
            sample_rate=rate, n_fft=int(c.get("n_fft", 1024)), hop=int(c.get("hop_size", 256)),
            mels=int(c.get("num_mels", 80)), fmin=float(c.get("fmin") or 0), fmax=float(c.get("fmax") or 0),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"{config} is no config of HiFi-GAN: {type(e).__name__}: {e}") from e
    factor = 1
    for r in c["upsample_rates"]:
        factor *= int(r)
    if factor != settings.hop:
        raise BadInput(f"{config}: upsample_rates make {factor} samples a frame, hop_size is {settings.hop}")
    return net, settings


def vocos(weights: dict[str, Tensor], settings: MelSettings | None) -> tuple[nn.Module, MelSettings]:
    """The network whose shapes the weights have, and its settings: those of the published model at 24 kHz."""
    try:
        dim, mels, _ = weights["backbone.embed.weight"].shape
        n_fft = len(weights["head.out.bias"]) - 2
        hidden = len(weights["backbone.convnext.0.pwconv1.bias"])
    except (KeyError, ValueError) as e:
        raise BadInput(f"the weights are not those of a Vocos: {e}") from e
    layers = len({name.split(".")[2] for name in weights if name.startswith("backbone.convnext.")})
    if settings is None:
        settings = MelSettings(24000, n_fft, n_fft // 4, mels, 0, 0, 1e-7, "htk", "none", "center")
    if settings.mels != mels or settings.n_fft != n_fft:
        raise BadInput(
            f"the Vocos has {mels} mels and n_fft {n_fft}, the settings {settings.mels} and {settings.n_fft}"
        )
    return Vocos(mels, dim, hidden, layers, n_fft, settings.hop, settings.padding), settings


def first(weights: dict[str, Tensor]) -> str:
    """Some names of tensors, for a message."""
    return "its tensors are " + (", ".join(list(weights)[:3]) or "none")


def fill_network(net: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load weights into a network. Raises BadInput where a name or a shape differs, or one is not finite."""
    own = net.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise BadInput(f"{where} lacks {len(missing)} tensors of the network, first {missing[0]}")
    if extra := sorted(weights.keys() - own.keys()):
        raise BadInput(f"{where} has {len(extra)} tensors that the network does not, first {extra[0]}")
    for name, w in weights.items():
        if w.shape != own[name].shape:
            raise BadInput(f"{where}: {name} is {tuple(w.shape)}, the network needs {tuple(own[name].shape)}")
        if not torch.isfinite(w).all():
            raise BadInput(f"{where}: {name} holds NaN or infinity")
    net.load_state_dict(weights)
