"""Evaluate models that speak, against recordings of the same texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..audio.corpus import Clip, open_corpus
from ..audio.griffin_lim import GriffinLim
from ..audio.mel import MelSettings, mel
from ..errors import BadInput, check_int
from ..metrics.speech_distance import SpeechDistance, speech_distance
from ..metrics.speech_quality import DNSMOS, DistillMOS
from ..metrics.speech_recognition import Moonshine
from ..metrics.speech_words import normalised_words, word_error_rate
from ..progress import ignore_messages
from ..sampling import Progress
from ..tasks.speech.speech import Speech

__all__ = ["SpeechRequest", "SpeechRow", "evaluate_speech", "speech_table"]

STAGES = ("text", "acoustic", "vocoder")
RECORDED, COPIED, GRIFFIN_LIM = "recordings", "vocoder of recordings", "Griffin-Lim of recordings"


@dataclass(frozen=True)
class SpeechRequest:
    """Which texts are spoken, and what the sounds are measured by.

    Args:
        data: a corpus (`open_corpus`), or its clips.
        split: of the corpus.
        n: at most so many clips, spread over the split. Default: all.
        words: fewest words of a text: a recogniser needs context.
        seed: of the noise.
        recogniser: `(audio (n,), sample rate) -> text`, or None for no word error rate.
        opinion: `(audio, sample rate) -> scores by name`, or None.
        distilled_opinion: `(audio, sample rate) -> score`, or None.
    """

    data: Any
    split: str = "test"
    n: int | None = None
    words: int = 6
    seed: int = 0
    recogniser: Callable[[Tensor, int], str] | None = None
    opinion: Callable[[Tensor, int], Mapping[str, float]] | None = None
    distilled_opinion: Callable[[Tensor, int], float] | None = None

    @classmethod
    def measured(cls, data: Any, warn: Callable[[str], None] = ignore_messages, **options: Any) -> SpeechRequest:
        """A request with the recogniser and the opinions that are installed. Others are named by `warn`."""
        found: dict[str, Any] = {}
        for name, make in (("recogniser", Moonshine), ("opinion", DNSMOS), ("distilled_opinion", DistillMOS)):
            try:
                found[name] = make()
            except BadInput as e:
                warn(f"not measured: {e}")
        return cls(data, **{**found, **options})

    def clips(self) -> list[Clip]:
        """The clips. Raises BadInput where no text has as many words."""
        opened = isinstance(self.data, (str, Path))
        clips = open_corpus(self.data, self.split) if opened else list(self.data)
        long = [clip for clip in clips if len(normalised_words(clip.text)) >= self.words]
        if not long:
            raise BadInput(f"none of the {len(clips)} texts has {self.words} words")
        if self.n is not None and check_int("n", self.n, 1) < len(long):
            long = [long[k * len(long) // self.n] for k in range(self.n)]
        return long


@dataclass
class SpeechRow:
    """What was measured of one way to speak.

    Args:
        name: of the row.
        sounds: each (n,), one a clip.
        texts: what the recogniser understood.
        distances: from the recordings.
        scores: of each clip, by name.
        seconds: of computing by stage, over all clips.
    """

    name: str
    sounds: list[Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    distances: list[SpeechDistance] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def figures(self, clips: Sequence[Clip], sample_rate: int) -> dict[str, Any]:
        """The row, ready for JSON: means over the clips, the word error rate with its interval of 95 %, and how many
        times faster than real time each stage is."""
        length = sum(len(x) for x in self.sounds) / sample_rate
        figures: dict[str, Any] = {"name": self.name, "clips": len(clips), "seconds_of_sound": round(length, 2)}
        if self.texts:
            rate = word_error_rate([clip.text for clip in clips], self.texts)
            figures |= {"word_error_rate": rate.rate, "interval": [rate.low, rate.high], "words": rate.words}
        for name in self.scores[0] if self.scores else ():
            figures[name] = mean([row[name] for row in self.scores])
        for name in ("mel_l1", "cepstral", "f0_cents", "voicing", "length") if self.distances else ():
            figures[name] = mean([getattr(row, name) for row in self.distances])
        if total := sum(self.seconds.values()):
            figures["real_time"] = {"total": length / total} | {
                name: length / seconds for name, seconds in self.seconds.items() if seconds > 0
            }
        return figures


def evaluate_speech(
    models: Mapping[str, tuple[Speech, int | None]],
    request: SpeechRequest,
    progress: Progress | None = None,
    griffin_lim: bool = True,
) -> dict[str, Any]:
    """Speak texts of recordings by several models, in turn clip by clip, and measure the sounds beside the recordings.

    The first rows are the recordings themselves, the vocoder on their spectrograms (what no model can be better than)
    and Griffin-Lim on the same.

    Args:
        models: by the name of the row, the model and its steps; None: those that it recommends.
        request: the texts and the measures.
        progress: called with the number of clips that are done, and of all.
        griffin_lim: with its row.

    Returns:
        `rows`, each as `SpeechRow.figures`; `clips`, with the text, and by row the sound and what was understood.

    Raises:
        BadInput: where the models have different sample rates, and without texts.
    """
    if not models:
        raise BadInput("evaluate_speech needs a model")
    first = next(iter(models.values()))[0]
    rate = first.sample_rate
    if any(speech.sample_rate != rate for speech, _ in models.values()):
        raise BadInput("the models have different sample rates: evaluate them one by one")
    clips = request.clips()
    griffin_lim = griffin_lim and first.vocoder is not None and not isinstance(first.vocoder, GriffinLim)
    rows = [SpeechRow(RECORDED), SpeechRow(COPIED), *([SpeechRow(GRIFFIN_LIM)] if griffin_lim else [])]
    fixed = len(rows)
    rows += [SpeechRow(name) for name in models]
    recordings = [clip.read(rate) for clip in clips]
    for speech, _ in models.values():  # what the first clip would pay for
        speech.warm_up()
        speech.vocode(mel(recordings[0], first.settings))
    for k, (clip, recording) in enumerate(zip(clips, recordings)):
        spectrum = mel(recording, first.settings)
        rows[0].sounds.append(recording)
        rows[1].sounds.append(first.vocode(spectrum)[: len(recording)])
        if griffin_lim:
            rows[2].sounds.append(GriffinLim(first.settings)(spectrum)[: len(recording)])
        for row, (speech, steps) in zip(rows[fixed:], models.values()):
            spoken = list(speech.sentences(clip.text, steps=steps, seed=request.seed))
            row.sounds.append(torch.cat([one.audio for one in spoken]))
            for one in spoken:
                for stage, seconds in one.seconds.items():
                    row.seconds[stage] = row.seconds.get(stage, 0.0) + seconds
        for number, row in enumerate(rows):
            distances = "aligned" if number < fixed else "warped"
            measure_sound(row, recording, request, first.settings, distances if number else "none")
        if progress is not None:
            progress(k + 1, len(clips))
    return {
        "rows": [row.figures(clips, rate) for row in rows],
        "sample_rate": rate,
        "clips": [
            {
                "text": clip.text,
                "sounds": {row.name: row.sounds[k] for row in rows},
                "understood": {row.name: row.texts[k] for row in rows if row.texts},
            }
            for k, clip in enumerate(clips)
        ],
    }


def measure_sound(
    row: SpeechRow, recording: Tensor, request: SpeechRequest, settings: MelSettings, distances: str = "warped"
) -> None:
    """Add the measures of the last sound of a row.

    Args:
        row: to add to.
        recording: of the same text, (n,).
        request: what is measured.
        settings: of the spectrograms.
        distances: from the recording: `warped` in time, `aligned` frame by frame, or `none`.
    """
    sound, rate = row.sounds[-1], settings.sample_rate
    if distances != "none":
        row.distances.append(speech_distance(recording, sound, settings, aligned=distances == "aligned"))
    if request.recogniser is not None:
        row.texts.append(request.recogniser(sound, rate))
    scores: dict[str, float] = {}
    if request.opinion is not None:
        scores |= {f"dnsmos_{name}": value for name, value in request.opinion(sound, rate).items()}
    if request.distilled_opinion is not None:
        scores["distillmos"] = request.distilled_opinion(sound, rate)
    if scores:
        row.scores.append(scores)


def mean(values: Sequence[float]) -> float:
    """The mean of the finite values, NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def spell_rate(row: Mapping[str, Any]) -> str:
    """A word error rate with its interval."""
    low, high = row["interval"]
    return f"{100 * row['word_error_rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


COLUMNS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("word errors", "word_error_rate", spell_rate),
    ("DNSMOS", "dnsmos_overall", lambda r: f"{r['dnsmos_overall']:.2f}"),
    ("DistillMOS", "distillmos", lambda r: f"{r['distillmos']:.2f}"),
    ("mel L1", "mel_l1", lambda r: f"{r['mel_l1']:.3f}"),
    ("cepstra", "cepstral", lambda r: f"{r['cepstral']:.2f} dB"),
    ("f0", "f0_cents", lambda r: f"{r['f0_cents']:.0f} cents"),
    ("x real time", "real_time", lambda r: f"{r['real_time']['total']:.1f}"),
    *((stage, stage, lambda r, stage=stage: f"{r['real_time'].get(stage, math.inf):.1f}") for stage in STAGES),
)  # fmt: skip


def speech_table(result: Mapping[str, Any]) -> list[list[str]]:
    """The rows of `evaluate_speech` as text, under the heads of the columns that were measured."""
    rows = [{**row, **{stage: 1 for stage in STAGES if stage in row.get("real_time", {})}} for row in result["rows"]]
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    table = [["", *(head for head, _, _ in columns)]]
    for row in rows:
        table.append([row["name"], *(text(row) if key in row else "–" for _, key, text in columns)])
    return table
