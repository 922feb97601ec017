"""Vocoders: sound from mel spectrograms by a network, or by Griffin-Lim where there are no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choice
from ..nets.harmonic_vocos import HarmonicVocos
from ..nets.hifigan import HiFiGAN
from ..nets.vocos import Vocos
from ..utils.atomic import write_atomic
from .griffin_lim import GriffinLim, check_mel
from .mel import MelSettings
from .published_vocoders import fill_network, published_vocoder

__all__ = ["Vocoder", "load_vocoder", "vocoder_network"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {"HarmonicVocos": HarmonicVocos, "HiFiGAN": HiFiGAN, "Vocos": Vocos}
DESCRIPTION, WEIGHTS = "vocoder.json", "vocoder.safetensors"


class Vocoder:
    """A network that makes sound, with the settings of the mel spectrograms that it was trained on.

    Args:
        net: `net(mel (B, M, L)) -> audio (B, n)`; a `HarmonicVocos` takes `f0` too.
        settings: of its spectrograms.
        card: what is known of its training, ready for JSON.
    """

    def __init__(self, net: nn.Module, settings: MelSettings, card: dict[str, Any] | None = None) -> None:
        self.net, self.settings, self.card = net.eval().requires_grad_(False), settings, card or {}

    @property
    def sample_rate(self) -> int:
        """Of the sound, in Hz."""
        return self.settings.sample_rate

    @torch.no_grad()
    def __call__(self, mel: Tensor, f0: Tensor | None = None) -> Tensor:
        """Audio (..., n), float32, of a log mel (..., M, L): n = L hop with the padding `same`.

        Args:
            mel: as `hasten.audio.mel.mel` with `settings` makes it.
            f0: pitch in Hz (..., L), for vocoders that take it, above 0 also in unvoiced frames. Default: read from
                the mel.

        Raises:
            BadInput: for a mel of another shape.
        """
        check_mel(mel, self.settings)
        weight = next(self.net.parameters())
        rows = mel.reshape(-1, *mel.shape[-2:]).to(weight)
        if f0 is not None and isinstance(self.net, HarmonicVocos):
            if f0.shape != (*mel.shape[:-2], mel.shape[-1]) or not (f0 > 0).all():
                raise BadInput(f"f0 must be above 0 Hz for each frame, {mel.shape[-1]}, got {tuple(f0.shape)}")
            audio = self.net(rows, f0.reshape(len(rows), -1))
        else:
            audio = self.net(rows)
        return audio.float().reshape(*mel.shape[:-2], -1)

    def save(self, folder: str | Path, half: bool = True) -> None:
        """Write `vocoder.safetensors` and `vocoder.json`, for `load_vocoder`.

        Args:
            folder: to write, created if necessary.
            half: in float16.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: w.detach().cpu().contiguous() for key, w in self.net.state_dict().items()}
        if half:
            weights = {key: w.half() if w.is_floating_point() else w for key, w in weights.items()}
        description = {
            "class": type(self.net).__name__,
            "config": self.net.config,
            "mel": self.settings.to_dict(),
            "card": self.card,
        }
        write_atomic(folder / WEIGHTS, save(weights))
        write_atomic(folder / DESCRIPTION, json.dumps(description, indent=1).encode())


def vocoder_network(name: str, config: dict[str, Any]) -> nn.Module:
    """A network by class name and config. Raises BadInput for another class, and for a config that it refuses."""
    try:
        return NETWORKS[check_choice("vocoder", name, NETWORKS)](**config)
    except TypeError as e:
        raise BadInput(f"{name}: {e}") from e


def load_vocoder(path: str | Path, settings: MelSettings | None = None) -> Vocoder | GriffinLim:
    """A vocoder from a folder or file.

    Args:
        path: a folder of `Vocoder.save` or `hasten train --task vocoder`; a published HiFi-GAN (a folder with
            `config.json` and the generator) or Vocos (a folder or file, .safetensors or .bin); or `griffin_lim`.
        settings: of the mel spectrograms, for `griffin_lim`, and for a Vocos with others than the published ones.

    Raises:
        BadInput: for a path without a vocoder, and for weights that do not fit.
    """
    if str(path) == "griffin_lim":
        return GriffinLim(settings or MelSettings())
    path = Path(path)
    if not path.exists():
        raise BadInput(f"there is no {path}: a vocoder is a folder with {DESCRIPTION}, a published one, or griffin_lim")
    if (path / DESCRIPTION).is_file():
        return own_vocoder(path)
    net, found = published_vocoder(path, settings)
    return Vocoder(net, found)


def own_vocoder(folder: Path) -> Vocoder:
    """The vocoder in a folder of `Vocoder.save`."""
    from safetensors.torch import load_file

    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        name, config, mel = description["class"], dict(description["config"]), dict(description["mel"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{folder / DESCRIPTION} cannot be read: {type(e).__name__}: {e}") from e
    net = vocoder_network(name, config)
    try:
        weights = load_file(folder / WEIGHTS)
    except Exception as e:  # safetensors raises various exceptions for damaged files
        raise BadInput(f"{folder / WEIGHTS} cannot be read: {type(e).__name__}: {e}") from e
    fill_network(net, weights, str(folder / WEIGHTS))
    return Vocoder(net, MelSettings.from_dict(mel), description.get("card"))
