"""`Speech`: a text as sound."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...audio.mel import MelSettings
from ...errors import BadInput, Notice, check_int
from ...loading import find_model_folder, load
from ...model.model import Model
from ...nets.acoustic import AcousticEncoder
from ...plan.draw import draw
from ...sampling import Noise
from .acoustic_model import AcousticModel
from .features import Corpus
from .text import FrontEnd, split_sentences

__all__ = ["Speech", "Spoken", "speech_model"]

SEGMENT_FRAMES = 192  # L of the samples of a model, with which it is distilled
ENCODER, ALIGNER = "encoder", "aligner"  # names of the parts
PAUSE = 0.25  # seconds between sentences
SPEEDS = (0.25, 4.0)


class Spoken(NamedTuple):
    """A sentence as sound.

    Args:
        text: the sentence.
        audio: (n,) float32 in [-1, 1].
        mel: log mel (M, L).
        seconds: of computing, by stage: `text`, `acoustic`, `vocoder`.
    """

    text: str
    audio: Tensor
    mel: Tensor
    seconds: dict[str, float]


@dataclass
class Speech:
    """An acoustic model with its text front end, and a vocoder.

    Args:
        model: a `Model` of spectrograms, as `train_speech` saves it, or a student distilled from it.
        vocoder: `vocoder(mel (M, L)) -> audio (n,)`, such as `hasten.audio.vocoder.load_vocoder` returns; None:
            Griffin-Lim, which needs no weights.

    Raises:
        BadInput: for a model that does not speak.
    """

    model: Model
    vocoder: Callable[[Tensor], Tensor] | None = None
    front: FrontEnd = field(init=False)
    settings: MelSettings = field(init=False)

    def __post_init__(self) -> None:
        about = self.model.card.get("speech")
        if not isinstance(about, dict) or ENCODER not in self.model.parts:
            raise BadInput(f"{self.model.name} does not speak: it needs a model of `hasten train --task speech`")
        self.front = FrontEnd(about["text"], tuple(about["symbols"]))
        self.settings = MelSettings.from_dict(about["mel"])
        theirs = getattr(self.vocoder, "settings", None)
        if isinstance(theirs, MelSettings) and theirs != self.settings:
            raise BadInput(
                f"{self.model.name} makes other spectrograms than the vocoder reads: {self.settings}, {theirs}"
            )

    @classmethod
    def load(cls, name: Any, vocoder: Any = None, device: Any = None) -> Speech:
        """Load a model by name or folder.

        Args:
            name: see `hasten.load`.
            vocoder: a vocoder, or its folder or file, or `griffin_lim`; None: the folder `vocoder` in that of the
                model, else Griffin-Lim.
            device: Default: the CPU.
        """
        from ...audio.vocoder import load_vocoder

        model = load(name, device)
        if vocoder is None and isinstance(name, (str, Path)):
            beside = find_model_folder(name) / "vocoder"
            vocoder = beside if beside.is_dir() else None
        if isinstance(vocoder, (str, Path)):
            vocoder = load_vocoder(vocoder, cls(model).settings)
        return cls(model, vocoder)

    def warm_up(self) -> None:
        """Load what the first sentence would wait for: the lexicon of the front end, the plan."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)  # of sounds that the model does not know
            try:
                self.spectrogram(self.front.ids("Hello."))
            except BadInput as e:
                if "pip install" in str(e):
                    raise

    @property
    def sample_rate(self) -> int:
        """Of the sound, in Hz."""
        return self.settings.sample_rate

    @property
    def speakers(self) -> tuple[str, ...]:
        """The names of the speakers; none for one without a name."""
        return tuple(self.model.card["speech"]["speakers"])

    @property
    def encoder(self) -> AcousticEncoder:
        """The encoder of phonemes."""
        encoder: Any = self.model.parts[ENCODER]
        return encoder

    @torch.no_grad()
    def mel(
        self, text: str, *, steps: int | None = None, speed: float = 1.0, seed: int = 0, speaker: str | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """The log mel (M, L) of one sentence.

        Args:
            text: a sentence.
            steps: model evaluations; None: those of the model.
            speed: > 1 is faster.
            seed: of the noise.
            speaker: a name; None: the first one.
            options: fields of `SamplingConfig`, such as `sampler`.

        Raises:
            BadInput: for a text without anything to say, and for settings that cannot be.
        """
        return self.spectrogram(self.front.ids(text), steps=steps, speed=speed, seed=seed, speaker=speaker, **options)

    def spectrogram(
        self, ids: list[int], *, steps: int | None = None, speed: float = 1.0, seed: int = 0,
        speaker: str | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """`mel` of the numbers of a sentence's tokens."""
        if not SPEEDS[0] <= speed <= SPEEDS[1]:
            raise BadInput(f"speed must lie between {SPEEDS[0]:g} and {SPEEDS[1]:g}, got {speed:g}")
        check_int("seed", seed, 0)
        device = self.model.device
        tokens = torch.tensor([ids], device=device)
        who = torch.tensor([self.speaker_index(speaker)], device=device)
        v = self.encoder.eval()(tokens, speaker=who, speed=speed)
        resolved = self.model.resolve(steps=steps, batch_size=1, **options)
        noise = Noise([seed], (self.settings.mels, v.frames.shape[1]), torch.float32, device)
        with resolved.runtime.apply():
            x = draw(
                resolved.denoiser, resolved.sampler, resolved.times, noise, plan=resolved.plan,
                cond={"frames": v.frames, "mask": v.mask},
            )  # fmt: skip
        return self.encoder.denormalize(x.float())[0].cpu().clamp(-12, 6)

    def speaker_index(self, name: str | None) -> int:
        """The index of a speaker. Raises BadInput for an unknown one."""
        if name is None:
            return 0
        if name not in self.speakers:
            known = ", ".join(self.speakers) or "it has one speaker, without a name"
            raise BadInput(f"{self.model.name} has no speaker {name!r}: {known}")
        return self.speakers.index(name)

    def vocode(self, mel: Tensor) -> Tensor:
        """The sound (n,) of a log mel (M, L)."""
        if self.vocoder is None:
            from ...audio.vocoder import GriffinLim

            self.vocoder = GriffinLim(self.settings)
        with torch.no_grad():
            return self.vocoder(mel).float().cpu().reshape(-1).clamp(-1, 1)

    def sentences(self, text: str, allow_empty: bool = False, **options: Any) -> Iterator[Spoken]:
        """The sentences of a text as sound, each as soon as it is made.

        Sentences without anything to say are left out.

        Args:
            text: of any length.
            allow_empty: a text without anything to say gives no sentence, and is no error.
            options: see `mel`.

        Raises:
            BadInput: where there is nothing to say in the whole text.
        """
        count = 0
        for sentence in split_sentences(text):
            start = time.perf_counter()
            try:
                ids = self.front.ids(sentence)
            except BadInput as e:
                if "nothing to say" in str(e) or "no sound" in str(e):
                    continue
                raise
            read = time.perf_counter()
            mel = self.spectrogram(ids, **options)
            drawn = time.perf_counter()
            audio = self.vocode(mel)
            done = time.perf_counter()
            count += 1
            yield Spoken(
                sentence, audio, mel, {"text": read - start, "acoustic": drawn - read, "vocoder": done - drawn}
            )
        if not count and not allow_empty:
            raise BadInput("nothing to say: a text needs letters or digits")

    def stream(self, text: str, **options: Any) -> Iterator[Tensor]:
        """Pieces of the sound of a text, one a sentence, with a pause after each but the last. Args as `sentences`."""
        pause = torch.zeros(int(PAUSE * self.sample_rate))
        for number, spoken in enumerate(self.sentences(text, **options)):
            yield spoken.audio if not number else torch.cat([pause, spoken.audio])

    def __call__(self, text: str, **options: Any) -> Tensor:
        """The sound (n,) of a text. Args as `sentences`."""
        return torch.cat(list(self.stream(text, **options)))


def teacher_times(entries: int) -> str:
    """The grid of times of a teacher: equally spaced from the last but one of the entries of its table to the first.

    The paper's sampler begins with plain noise at the fourth of 5 entries, whose alpha is .0016.

    Args:
        entries: of the table.
    """
    return f"uniform:start={(entries - 1) / entries!r}"


def speech_model(
    trained: AcousticModel, corpus: Corpus, name: str, card: dict[str, Any], energy: Sequence[float] | None = None
) -> Model:
    """A trained acoustic model as a `Model`, with the encoder as its part `encoder`.

    Args:
        trained: the averaged weights.
        corpus: that it was trained on.
        name: of the model.
        card: what else to note.
        energy: mean and deviation of the log energy; None: those of the corpus.
    """
    table = getattr(trained.denoiser.schedule, "alphas_cumprod", ())
    about = {
        "text": corpus.text,
        "symbols": list(corpus.symbols),
        "speakers": list(corpus.speakers),
        "mel": corpus.settings.to_dict(),
        "energy": [float(value) for value in (corpus.statistics()["energy_stats"] if energy is None else energy)],
    }
    steps = min(4, len(table) - 1)
    return Model(
        trained.denoiser,
        name,
        (corpus.settings.mels, SEGMENT_FRAMES),
        codec="raw",
        sampler="ddpm",
        times=teacher_times(len(table)),
        steps=steps,
        parts={ENCODER: trained.encoder} | ({} if corpus.aligner is None else {ALIGNER: corpus.aligner}),
        card={"summary": "text to speech: the spectrogram of phonemes", "speech": about, **card},
    )
