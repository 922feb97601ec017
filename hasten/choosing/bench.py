"""What measures the candidates of a search: images of the same seeds as the plain model's, times in turns."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..compare.counting import count_evaluations, start_nfe
from ..compare.jobs import error_summary, model_with_files, prepare_row, sample_images
from ..compare.parts import PARTS, time_parts
from ..compare.variants import Variant
from ..model.model import Label, Model
from ..performance import cost
from ..progress import ProgressReporter
from .losses import Figure, joined
from .store import MeasurementStore

__all__ = ["Bench", "key_of"]

KEPT = 12  # prepared models in memory
PLAIN = "plain"


def key_of(variant: Variant) -> str:
    """The name of a candidate in the store."""
    return hashlib.sha256(repr(variant.method).encode()).hexdigest()[:12]


@dataclass
class Bench:
    """Measures candidates against the plain model; what is in the store is not measured again.

    Args:
        model: The model.
        plain: How it is sampled without a search.
        figure: What the loss is measured by.
        store: Of what is measured.
        progress: Is advanced by every evaluation.
        label: The prompts, of a model that takes prompts.
        seed: The seed of image 0.
        precision: Of the network.
        batch_size: Images per batch.
        timing: Images per timed batch, and rounds.
        sources: Source images (m, C, h, w) of a model that reads them; image k has number k mod m.
    """

    model: Model
    plain: Variant
    figure: Figure
    store: MeasurementStore
    progress: ProgressReporter
    label: Label = None
    seed: int = 0
    precision: str = "fp32"
    batch_size: int = 64
    timing: tuple[int, int] = (4, 3)
    sources: Tensor | None = None
    _models: dict[str, Model] = field(default_factory=dict, repr=False)
    # What a decision may use: not what a stopped run has found later, so that the same command decides the same.
    _nfe: dict[str, float] = field(default_factory=dict, repr=False)
    _relative: dict[str, float] = field(default_factory=dict, repr=False)

    # ---- what is sampled ----

    def labels(self, first: int, count: int) -> Label:
        """Labels or prompts of images first, first + 1, ..., those of one long run."""
        if self.model.conditioning is not None:
            prompts: Any = self.label
            return [prompts[(first + k) % len(prompts)] for k in range(count)]
        if self.model.classes is None:
            return None
        return torch.tensor([(first + k) % len(self.model.classes) for k in range(count)])

    def given(self, first: int, count: int) -> Tensor | None:
        """Source images of images first, first + 1, ...; None for a model that reads none."""
        return None if self.sources is None else self.sources[torch.arange(first, first + count) % len(self.sources)]

    def groups(self, parts: Sequence[tuple[int, int]]) -> list[Hashable] | None:
        """The prompt or source of each image: those of one are not independent. None for other models."""
        prompts: Any = self.label if self.model.conditioning is not None else self.sources
        if prompts is None:
            return None
        return [(first + k) % len(prompts) for first, count in parts for k in range(count)]

    def prepared(self, variant: Variant) -> Model:
        """The model of a candidate; the last few stay in memory, since calibration may take long."""
        key = key_of(variant)
        model = self._models.pop(key, None)
        if model is None:
            while len(self._models) >= KEPT:
                self._models.pop(next(iter(self._models)))
            with count_evaluations(self.model, self.progress) as count:  # those of calibration
                base = model_with_files(self.model, variant, "choose")
                model = prepare_row(base, variant, self.model, "choose")
            self.spend(count[0])
        self._models[key] = model
        return model

    def images(self, variant: Variant, first: int, count: int, offset: int = 0) -> Tensor:
        """Images of a candidate, of seeds first + offset on and the labels of first on."""
        model = self.prepared(variant)
        with count_evaluations(model, self.progress) as evaluations:
            seed = self.seed + first + offset
            batch = min(self.batch_size, count)
            images = sample_images(
                model, variant, count, seed, batch, self.precision, self.labels(first, count), self.given(first, count)
            )
        key = key_of(variant)
        self.store.figures(key)["nfe"] = self._nfe[key] = evaluations[0] / count + start_nfe(model, variant)
        self.spend(evaluations[0])
        return images

    def spend(self, evaluations: int) -> None:
        """Add to the cost of the search."""
        spent = self.store.state["spent"]
        spent["evaluations"] = spent.get("evaluations", 0) + evaluations

    @contextlib.contextmanager
    def clocked(self) -> Iterator[None]:
        """Add the seconds within the block to the cost of the search."""
        wall, own = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent = self.store.state["spent"]
            spent["seconds"] = spent.get("seconds", 0.0) + time.perf_counter() - wall
            spent["cpu_seconds"] = spent.get("cpu_seconds", 0.0) + time.process_time() - own
            self.store.save()

    # ---- losses ----

    def plain_images(self, first: int, count: int) -> Tensor:
        """Images of the plain model, stored."""
        found = self.store.rows(f"{PLAIN}-images", first, count)
        if found is None:
            with self.clocked():
                images = self.images(self.plain, first, count).half()
                self.store.put_rows(f"{PLAIN}-images", first, count, {"images": images})
            return images.float()
        self.recall_nfe(key_of(self.plain))
        return found["images"].float()

    def recall_nfe(self, key: str) -> None:
        """Use the stored evaluations of an image from now on."""
        if "nfe" in self.store.figures(key):
            self._nfe[key] = float(self.store.figures(key)["nfe"])

    def rows(self, variant: Variant, first: int, count: int) -> dict[str, Tensor]:
        """What of each seed the loss of a candidate is computed from."""
        key = key_of(variant)
        found = self.store.rows(key, first, count)
        if found is None:
            plain = self.plain_images(first, count)
            with self.clocked():
                images = plain if variant.method == self.plain.method else self.images(variant, first, count)
                found = self.figure.rows(images.half().float(), plain)
                self.store.put_rows(key, first, count, found)
        self.recall_nfe(key)
        return found

    def loss(self, variant: Variant, parts: Sequence[tuple[int, int]]) -> Any:
        """The `PairedLoss` of a candidate on seeds given as (first, count)."""
        own, plain = (joined([self.rows(v, *part) for part in parts]) for v in (variant, self.plain))
        return self.figure.loss(own, plain, self.groups(parts))

    # ---- failures ----

    def failure(self, variant: Variant, first: int, count: int) -> str | None:
        """Measure a candidate; the reason where that failed, now or before."""
        key, failed = key_of(variant), self.store.state["failed"]
        if key not in failed:
            try:
                self.rows(variant, first, count)
            except Exception as error:
                if os.environ.get("HASTEN_DEBUG", "0") not in ("", "0"):
                    raise
                failed[key] = error_summary(error).removeprefix("choose: ")
                self.store.save()
        reason: str | None = failed.get(key)
        return reason

    # ---- times ----

    def time(self, variants: Sequence[Variant], purpose: str) -> None:
        """Time candidates and the plain model in turns, unless they were for this purpose."""
        every = {key_of(v): v for v in (self.plain, *variants)}
        stored = {key: self.store.figures(key).get("timed", {}).get(purpose) for key in every}
        if all(stored.values()):
            self._relative |= {key: times[0] for key, times in stored.items()}
            for key in every:
                self.recall_nfe(key)
            return
        batch, rounds = self.timing
        calls = {key: functools.partial(self.images, v, 0, batch) for key, v in every.items()}
        parts: dict[str, float] = {}
        watch = time_parts(self.model, parts) if not variants else contextlib.nullcontext()
        with self.clocked(), watch:
            seconds = cost.interleave(calls, rounds, warmup=1)
        plain = key_of(self.plain)
        if parts.get("total"):  # of text encoder and decoder, which fewer steps do not make cheaper
            share = sum(parts.get(name, 0.0) for name in PARTS) / parts["total"]
            self.store.figures(plain)["fixed"] = min(share, 0.99)
        for key in every:
            ratio = cost.ratio(seconds[plain], seconds[key])
            figures = self.store.figures(key)
            figures.setdefault("timed", {})[purpose] = [1 / ratio.median, 1 / ratio.high, 1 / ratio.low]
            self._relative[key] = 1 / ratio.median
            if key == plain:
                figures.setdefault("seconds", sorted(seconds[key])[rounds // 2] / batch)
        self.store.save()

    @property
    def plain_seconds(self) -> float:
        """Seconds of an image of the plain model."""
        return float(self.store.figures(key_of(self.plain)).get("seconds", 1.0))

    def relative(self, variant: Variant) -> float:
        """Seconds of a candidate over the plain model's: as timed, else by its evaluations."""
        key, base = key_of(variant), key_of(self.plain)
        if key in self._relative:
            return self._relative[key]
        nfe = self.nfe(variant)
        cheaper = 0.7 if len(variant.accelerators) > len(self.plain.accelerators) else 1.0
        fixed = float(self.store.figures(base).get("fixed", 0.0))
        share = nfe / max(self.nfe(self.plain), 1)
        return float(cheaper * (fixed + (1 - fixed) * share))

    def declared_nfe(self, variant: Variant) -> float:
        """Evaluations of an image before any was sampled."""
        if (known := variant.nfe) is not None:
            return known
        table = self.model.plans.get(variant.plan or "", self.model.plan)
        steps = variant.steps or (table.nfe if variant.plan is not None and table is not None else 1)
        student = variant.model is not None or variant.lora is not None
        guided = 2 if variant.doubled and variant.guidance_scale != 1 and not student else 1
        if variant.plan is not None and table is not None and table.branches is not None:
            guided = 1
        return steps * guided * (0.75 if variant.guides else 1)

    def seconds(self, variant: Variant) -> float:
        """Seconds of an image of a candidate."""
        return self.relative(variant) * self.plain_seconds

    def knows_time(self, variant: Variant) -> bool:
        """Whether `relative` is no guess: a candidate was timed, or is the plain network with other steps."""
        return self.has_time(variant) or self.is_same_network(variant)

    def is_same_network(self, variant: Variant) -> bool:
        """Whether a candidate runs the plain model's network, so that its evaluations say how fast it is."""
        names = ("model", "lora", "decoder", "accelerators")
        return all(getattr(variant, name) == getattr(self.plain, name) for name in names)

    def has_time(self, variant: Variant) -> bool:
        """Whether a candidate was timed."""
        return key_of(variant) in self._relative

    def nfe(self, variant: Variant) -> float:
        """Evaluations of an image, as counted, or before that as declared."""
        return self._nfe.get(key_of(variant)) or self.declared_nfe(variant)
