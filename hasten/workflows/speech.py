"""Train an acoustic model on recorded speech with its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ..audio.corpus import open_corpus
from ..audio.mel import MelSettings
from ..distillers.prodiff import prodiff_schedule
from ..distributed.ranks import Ranks
from ..errors import BadInput, check_choice, check_int
from ..files import holds_lock, refuse_inside
from ..loading import load
from ..progress import ignore_messages
from ..tasks.speech.acoustic_model import PRESETS, AcousticModel, make_acoustic_model
from ..tasks.speech.batches import SpeechBatches
from ..tasks.speech.features import Corpus, corpus_features
from ..tasks.speech.speech import Speech, speech_model
from ..tasks.speech.text import KINDS
from ..train.checkpoint import saved_run
from ..train.fit import Fit
from ..train.trained_module import OPTIMISERS, TrainedModule
from ..utils.config import Config
from ..utils.random import preserve_rng_state
from .training_run import check_output_folder, last_log_entry, saved_model_at

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SpeechConfig", "train_speech"]

FEATURES = "features.pt"  # in the folder of a run


@dataclass(frozen=True)
class SpeechConfig(Config):
    """How to train an acoustic model.

    Args:
        preset: `small`, for CPUs, `paper` (15.09 million weights in the denoiser) or `tiny`.
        text: `phonemes`, of English, or `characters`, of languages written in Latin letters.
        steps, minutes: the budget, whichever is used up first. Default: 60 minutes.
        batch_size: clips in a batch.
        lr: peak learning rate.
        optimiser: see `TrainConfig`.
        prediction: `x0`; `eps`, as earlier models, needs many more steps of sampling.
        entries: of the table of noise levels: 5, as the paper has it, for up to 4 steps; 101 to compare many steps.
        seed: of the weights, the order of the clips and the noise.
        split: of the corpus, where it has splits.
    """

    preset: str = "small"
    text: str = "phonemes"
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    lr: float = 1e-3
    optimiser: str = "adamw"
    prediction: str = "x0"
    entries: int = 5
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        check_choice("text", self.text, KINDS)
        check_choice("optimiser", self.optimiser, OPTIMISERS)
        check_choice("prediction", self.prediction, ("x0", "eps"))
        check_int("entries", self.entries, 2)
        check_int("batch_size", self.batch_size, 1)
        check_int("seed", self.seed, 0)


class SpeechOptions(TypedDict, total=False):
    """The fields of `SpeechConfig` as keyword arguments."""

    preset: str
    text: str
    steps: int | None
    minutes: float | None
    batch_size: int
    lr: float
    optimiser: str
    prediction: str
    entries: int
    seed: int
    split: str


@holds_lock("out")
@preserve_rng_state()
def train_speech(
    data: str | Path | Corpus,
    out: str | Path,
    config: SpeechConfig | None = None,
    *,
    device: str | None = None,
    mel_settings: MelSettings | None = None,
    show: bool = True,
    log: Callable[[str], None] = ignore_messages,
    **options: Unpack[SpeechOptions],
) -> Speech:
    """Train an acoustic model on speech with its text, and save it. The alignment of the two is learned meanwhile.

    The same call resumes from the checkpoint in `out` of a stopped or killed run. `out/features.pt` keeps what is
    computed from the sounds.

    Args:
        data: a folder or zip in the layout of LJSpeech (`open_corpus`), or a `Corpus`.
        out: the folder of the model, its checkpoint and its log.
        config: preset, budget and optimiser. Default: `SpeechConfig()`.
        device: `cpu`, `cuda`, ... Default: a GPU if there is one.
        mel_settings: of the spectrograms, those of the vocoder. Default: 80 bands at 16 kHz.
        show: show a progress bar, if stderr is a terminal.
        log: called with a line about the data.
        options: fields of `SpeechConfig`.

    Returns:
        The model as it is saved in `out`.

    Raises:
        BadInput: for data or settings that cannot be used, and if `out` holds another model or run.
        HastenError: if the loss is not finite.
        KeyboardInterrupt: at Ctrl-C, after a checkpoint is written.

    References:
        Huang, Zhao, Liu, Liu, Cui, Ren 2022, arXiv:2207.06389; Kim et al. 2020, arXiv:2005.11129 (alignment).
    """
    config = SpeechConfig.of(config, options)
    out = Path(out)
    if not isinstance(data, Corpus):
        refuse_inside(out, data)
    minutes = 60.0 if config.steps is None and config.minutes is None else config.minutes
    fit = Fit(steps=config.steps, minutes=minutes, seed=config.seed, device=device, warmup=500)
    ranks = Ranks.start(device)
    previous = ranks.on_main_process(lambda: saved_run(out / "checkpoint.pt"))
    finished = bool(previous) and fit.progress(previous["step"], previous["seconds"]) >= 1
    ranks.on_main_process(lambda: check_output_folder(out, finished))
    if isinstance(data, Corpus):
        corpus = data
    else:
        settings = mel_settings or MelSettings()
        clips = open_corpus(data, config.split)
        corpus = ranks.on_main_process(lambda: corpus_features(clips, settings, config.text, out / FEATURES))
    log(f"{len(corpus.clips)} clips, {corpus.seconds / 60:.1f} minutes, {len(corpus.symbols)} tokens")
    torch.manual_seed(config.seed)
    known = corpus.statistics()
    model = make_acoustic_model(
        len(corpus.symbols), corpus.settings.mels, config.preset, len(corpus.speakers),
        prodiff_schedule(config.entries - 1), config.prediction,
    )  # fmt: skip
    for name in ("mel_mean", "mel_std", "f0_stats"):
        getattr(model.encoder, name).copy_(known[name])
    trained = TrainedModule("model", model, model, config.lr, (0.9, 0.98), 0.01, config.optimiser)
    shared = {
        "network": model.denoiser.net.config,
        "encoder": model.encoder.config,
        "prediction": config.prediction,
        "entries": config.entries,
        "corpus": corpus.fingerprint(),
    }
    averages = fit([trained], SpeechBatches(corpus, config.batch_size, config.seed), out, show, shared)
    if finished and (saved := ranks.on_main_process(lambda: saved_model_at(out, previous["step"]))):
        return Speech(load(saved))
    averaged: Any = averages["model"]
    card = {
        "data": None if isinstance(data, Corpus) else str(data),
        "clips": len(corpus.clips),
        "minutes_of_speech": round(corpus.seconds / 60, 2),
        "preset": config.preset,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "seed": config.seed,
        "last": last_log_entry(out / "log.jsonl"),
    }
    made = speech_model(averaged_model(averaged), corpus, out.resolve().name, card)
    if ranks.is_main_process:
        made.save(out)
    ranks.barrier()
    return Speech(made)


def averaged_model(module: Any) -> AcousticModel:
    """The averaged weights, for sampling. Raises BadInput for another module."""
    if not isinstance(module, AcousticModel):
        raise BadInput(f"expected an acoustic model, found {type(module).__name__}")
    return module.cpu().eval().requires_grad_(False)
