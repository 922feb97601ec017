"""Train a vocoder on recordings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..audio.corpus import Clip, open_corpus
from ..audio.mel import MelSettings
from ..audio.pitch import track_pitch
from ..audio.vocoder import Vocoder, vocoder_network
from ..errors import BadInput, check_choice, check_int
from ..files import atomic_open, describe_contents, holds_lock, refuse_inside
from ..nets.audio_discriminators import AudioDiscriminators
from ..nets.harmonic_vocos import HarmonicVocos
from ..progress import ignore_messages
from ..train.ema import Ema
from ..train.fit import Fit
from ..train.vocoder import VocoderBatches, VocoderLoss
from ..utils.config import Config
from ..utils.random import preserve_rng_state
from .training_run import last_log_entry

if TYPE_CHECKING:
    from typing_extensions import Unpack

NETWORKS = {"harmonic_vocos": "HarmonicVocos", "vocos": "Vocos"}


@dataclass(frozen=True)
class VocoderConfig(Config):
    """The budget, network, loss and optimiser of the training of a vocoder (`train_vocoder`).

    Args:
        steps: budget of steps.
        minutes: budget of training time; whichever budget is used up first ends the run. Default: 30 without `steps`.
        network: `harmonic_vocos` (filters of pulses and noise, for short training) or `vocos` (the plain one).
        sample_rate, n_fft, hop, mels, fmin, fmax: of the mel spectrograms (`MelSettings`).
        dim, hidden, layers: channels, inner channels and number of the network's blocks.
        mel, spectral, gan, features: weights of the loss (`VocoderLoss`); `gan` 0 trains without discriminators.
        gan_start: fraction of the budget after which the discriminators start, in [0, 1).
        frames: length of the pieces trained on.
        batch_size: pieces in a batch.
        lr, discriminator_lr: peak learning rates.
        optimiser: `adamw` or `muon`, of the vocoder.
        precision: `fp32` or `bf16` (autocast).
        seed: of the weights, the pieces and the noise.
        grad_accumulation: micro-batches that a process splits its batch into, to need less memory.
    """

    steps: int | None = None
    minutes: float | None = None
    network: str = "harmonic_vocos"
    sample_rate: int = 16000
    n_fft: int = 1024
    hop: int = 256
    mels: int = 80
    fmin: float = 0.0
    fmax: float = 0.0
    dim: int = 192
    hidden: int = 576
    layers: int = 6
    mel: float = 2.0
    spectral: float = 1.0
    gan: float = 0.5
    features: float = 1.0
    gan_start: float = 0.4
    frames: int = 48
    batch_size: int = 8
    lr: float = 1e-3
    discriminator_lr: float = 5e-4
    optimiser: str = "adamw"
    precision: str = "fp32"
    seed: int = 0
    grad_accumulation: int = 1

    def settings(self) -> MelSettings:
        """Of the mel spectrograms."""
        return MelSettings(self.sample_rate, self.n_fft, self.hop, self.mels, self.fmin, self.fmax)

    def build(self) -> torch.nn.Module:
        """The untrained network."""
        name = NETWORKS[check_choice("network", self.network, NETWORKS)]
        for field in ("dim", "hidden", "layers", "frames", "batch_size"):
            check_int(field, getattr(self, field), 1)
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("mels", "dim", "hidden", "layers", "n_fft", "hop")
        }
        if name == "HarmonicVocos":
            options |= {name: getattr(self, name) for name in ("sample_rate", "fmin", "fmax")}
        return vocoder_network(name, options)


class VocoderOptions(TypedDict, total=False):
    """The fields of `VocoderConfig` as keyword arguments."""

    steps: int | None
    minutes: float | None
    network: str
    sample_rate: int
    n_fft: int
    hop: int
    mels: int
    fmin: float
    fmax: float
    dim: int
    hidden: int
    layers: int
    mel: float
    spectral: float
    gan: float
    features: float
    gan_start: float
    frames: int
    batch_size: int
    lr: float
    discriminator_lr: float
    optimiser: str
    precision: str
    seed: int
    grad_accumulation: int


@holds_lock("out")
@preserve_rng_state()
def train_vocoder(
    data: str | Path | Sequence[Clip],
    out: str | Path,
    config: VocoderConfig | None = None,
    *,
    device: str | None = None,
    show: bool = True,
    log: Callable[[str], None] = ignore_messages,
    **options: Unpack[VocoderOptions],
) -> dict[str, Any]:
    """Train a vocoder and save the EMA of its weights in `out`, which `hasten.audio.vocoder.load_vocoder` reads.

    The same call resumes from the checkpoint in `out` of a stopped run.

    Args:
        data: the path of a corpus (`open_corpus`), of which the split `train` is used, or its clips.
        out: the folder of the vocoder, its checkpoint and its log.
        config: budget, network, loss and optimiser. Default: `VocoderConfig()`.
        device: `cpu`, `cuda`, ... Default: a GPU if there is one.
        show: show a progress bar, if stderr is a terminal.
        log: called with a line about what is done.
        options: fields of `VocoderConfig`.

    Returns:
        What `vocoder.json` holds as its card: parameters, clips, seconds of sound, settings, the last losses.

    Raises:
        BadInput: for data or settings that cannot be used, or if `out` holds a run of others.
        HastenError: if the loss is not finite.
        KeyboardInterrupt: at Ctrl-C, after a checkpoint is written.
    """
    config = VocoderConfig.of(config, options)
    refuse_inside(out, data)
    out = Path(out)
    if not (out / "checkpoint.pt").is_file() and (found := describe_contents(out)):
        raise BadInput(f"{out} holds {found} already: choose another folder, or remove it")
    torch.manual_seed(check_int("seed", config.seed, 0))
    settings, net = config.settings(), config.build()
    clips = open_corpus(data, "train") if isinstance(data, (str, Path)) else list(data)
    sounds = [clip.read(settings.sample_rate) for clip in clips]
    seconds = sum(len(x) for x in sounds) / settings.sample_rate
    log(f"{len(clips)} recordings, {seconds / 60:.1f} minutes at {settings.sample_rate} Hz")
    digest = hashlib.sha256(json.dumps(settings.to_dict()).encode())
    for x in sounds:
        digest.update(x.numpy().tobytes())
    pitches = None
    if isinstance(net, HarmonicVocos):
        pitches = cached_pitches(sounds, settings, out / "pitch.pt", digest.hexdigest(), log)
    discriminators = AudioDiscriminators() if config.gan else None
    loss = VocoderLoss(settings, discriminators, config.mel, config.spectral, 0.2, config.gan, config.features)
    trained = loss.modules(net, config.lr, config.discriminator_lr, config.gan_start, config.optimiser)
    batches = VocoderBatches(sounds, pitches, settings.hop, config.frames, config.batch_size, config.seed)
    run = {"data": digest.hexdigest()[:16], "network": net.config, "loss": loss.weights, "frames": config.frames}
    averaged = fit_vocoder(config, device)(trained, batches, out, show, run)["vocoder"]
    card = {
        "parameters": sum(p.numel() for p in averaged.parameters()),
        "clips": len(clips),
        "seconds": round(seconds, 1),
        "settings": config.to_dict(),
        "last": last_log_entry(out / "log.jsonl"),
    }
    Vocoder(averaged.cpu(), settings, card).save(out)
    return card


def fit_vocoder(config: VocoderConfig, device: str | None) -> Fit:
    """The training loop of a config."""
    return Fit(
        steps=config.steps,
        minutes=30.0 if config.steps is None and config.minutes is None else config.minutes,
        warmup=100 if config.steps is None else min(100, config.steps // 10),
        clip=10.0,
        precision=config.precision,
        ema=Ema("power", gamma=16.0),
        seed=config.seed,
        device=device,
        accumulate=config.grad_accumulation,
        log_steps=25,
    )


def cached_pitches(
    sounds: Sequence[Tensor], settings: MelSettings, file: Path, key: str, log: Callable[[str], None]
) -> list[tuple[Tensor, Tensor]]:
    """The pitch of each sound (`track_pitch`), kept in a file for a run that is resumed."""
    if file.is_file():
        try:
            saved = torch.load(file, weights_only=True)
            if saved["key"] == key:
                return [(f0, voiced) for f0, voiced in saved["pitches"]]
        except Exception as e:  # torch.load raises various exceptions for damaged files
            log(f"{file} cannot be read ({type(e).__name__}): the pitch is tracked again")
    log("tracking the pitch")
    pitches = [track_pitch(x, settings) for x in sounds]
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(file) as opened:
        torch.save({"key": key, "pitches": pitches}, opened)
    return pitches
