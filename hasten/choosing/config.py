"""The options of `choose`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from ..errors import BadInput, check_int
from ..utils.config import Config
from .candidates import KINDS

__all__ = ["ChooseConfig", "ChooseOptions"]

LEAST_SEEDS = 16  # of a certificate


@dataclass(frozen=True)
class ChooseConfig(Config):
    """What to choose, and from what.

    Args:
        loss: the largest loss: "5%", or 0.05. Of a model with real images to compare with, by how much the Fréchet
            distance may be larger than the plain model's; of another, how far features may be from those of the plain
            image of the same seed, as a share of the distance between two seeds. Default: "5%", unless the next or the
            one after is given.
        psnr: the least mean PSNR to the plain model's images of the same seeds, in dB.
        seconds: the longest time of an image; the least loss within it is sought.
        confidence: of the certificate.
        n: fresh seeds of the certificate. Default: 480 for a Fréchet distance, else 64. The rounds of the search use
            an eighth, a quarter and half of it.
        seed: of image 0.
        plain: how the plain model samples. Default: as the model recommends.
        variants: a set of variants, bundled or a TOML file, whose rows are the candidates. Default: samplers, grids,
            plans, students and LoRAs at hand, then with guidance in parts, caches, integers and light decoders.
        exclude: kinds of candidates that are excluded: plan, guidance, cache, bits, student, lora, decoder.
        students: further models of the same images. loras: further LoRA files.
        compile: also try torch.compile, whose first call takes minutes on a CPU.
        for_diffusers: nothing that `hasten.apply` cannot put into a pipeline of diffusers.
        data, split, judge, prompts, reference, features: what quality is measured by, as in `CompareConfig`.
        precision: of the network, the same for all.
        batch_size: images per batch. timing_batch, rounds: of the timing.
    """

    renamed: ClassVar[Mapping[str, str]] = {"without": "exclude"}

    loss: str | float | None = None
    psnr: float | None = None
    seconds: float | None = None
    confidence: float = 0.95
    n: int | None = None
    seed: int = 0
    plain: Any = None
    variants: str | Path | None = None
    exclude: Sequence[str] = ()
    students: Sequence[str] = ()
    loras: Sequence[str] = ()
    compile: bool = False
    for_diffusers: bool = False
    data: str | Path | None = None
    split: str = "test"
    judge: Any = None
    prompts: Any = None
    reference: Any = None
    features: Any = None
    precision: str = "auto"
    batch_size: int = 64
    timing_batch: int = 4
    rounds: int = 3

    def __post_init__(self) -> None:
        for name, least in {"seed": 0, "batch_size": 1, "timing_batch": 1, "rounds": 1}.items():
            check_int(name, getattr(self, name), least)
        if self.n is not None:
            check_int("n", self.n, LEAST_SEEDS)
        if not 0.5 <= self.confidence < 1:
            raise BadInput(f"confidence must be from 0.5 to below 1, got {self.confidence!r}")
        if unknown := [name for name in self.exclude if name not in KINDS]:
            raise BadInput(f"exclude takes {', '.join(KINDS)}, got {unknown[0]!r}")


class ChooseOptions(TypedDict, total=False):
    """The fields of `ChooseConfig` as keyword arguments."""

    loss: str | float | None
    psnr: float | None
    seconds: float | None
    confidence: float
    n: int | None
    seed: int
    plain: Any
    variants: str | Path | None
    exclude: Sequence[str]
    students: Sequence[str]
    loras: Sequence[str]
    compile: bool
    for_diffusers: bool
    data: str | Path | None
    split: str
    judge: Any
    prompts: Any
    reference: Any
    features: Any
    precision: str
    batch_size: int
    timing_batch: int
    rounds: int
