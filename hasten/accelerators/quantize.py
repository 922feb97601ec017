"""Q-Diffusion: weights of 8 or 4 bits, activations of 8, with ranges that hold at all times of the sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from ..denoiser import Denoiser
from ..errors import BadInput
from ..nets.quantized import layers
from ..nets.time_groups import TimeGroups
from . import EXCHANGE, FIRST_SEED, Call, SamplingContext
from ._quantization.calibration import Samples, bounds, chosen
from ._quantization.quantizer import check_bits
from ._quantization.session import QuantizationSession, SessionProgress

__all__ = ["Quantize"]

ENDS = ("conv_in", "conv_out")
GROUPS = 6
BATCH, PLACES = 32, 2**17  # rows that the network is asked at once, and at the most so many latents or pixels of them


@dataclass(frozen=True)
class Quantize:
    """Every convolution and linear layer in integers: `y = bias + s_x s_w conv(u - z_x, q - z_w)`, with

        u = clamp(round(x / s_x) + z_x, 0, 255) of the activations, one range a layer,
        q = clamp(round(w / s_w) + z_w, low, high) of the weights, one range an output channel.

    Attention's products, norms and what is between the layers stay in floating point.

    weights: 8 bits (symmetric, -127..127) or 4 (with a zero-point, 0..15).
    acts: 8 bits, or none: activations stay as they are, and only the weights' file is smaller.
    ranges: "search", of 80 shrunken ranges the one of least L_2.4 error, or "minmax".
    rounding: "nearest", or "adaround": learned block after block from what the network is asked, in minutes to hours.
    learn_steps: afterwards learn the steps of the activations too, block after block.
    iterations: of both, a block. rate: of AdaRound's Adam; the paper's .001 is for 20,000 iterations, not for hundreds.
    split: layers that read `cat([h, skip])`, which are the shortcuts of a U-Net's expanding half, get ranges for either
        half; h and skip differ much in scale.
    rank: of a branch in floating point that is added to each layer and takes over the largest part of its weights; it
        needs no data, and rank (C_in k^2 + C_out) float16 numbers a layer.
    groups: of times, each with ranges of its own; None: 6, or as many as the sampling has times. They cost no time, and
        take 40 % of the error of 8 bits.
    correct: shift the biases by what rounding adds to each channel on average; None: where the rounding is the nearest.
        What is learned of a block makes up for its layers' means already, and correcting each of them undoes it.
    keep: names or patterns of modules that stay in floating point. conv_in and conv_out (wherever they are) do by
        default: of the bundled teacher they are 0.2 % of the weights, and with 4-bit weights half of the error of x0.
    eight: share of the weights, 0 to 1, that get 8 bits where `weights` is 4: those of the layers whose 4 bits cost x0
        most, for their size. 5.4 % of the bundled teacher's make 70 % of the squared error.
    images: that are sampled for the calibration, at `steps` evenly spread queries, all of these together.

    Convolutions of groups or of one dimension stay as they are. What is split and what is a block is seen by running
    the network once, so that any network will do (blocks: those of hasten and `diffusers`, else each layer by itself).

    Raises BadInput where nothing can be sampled first, and for a network without such layers or quantised before.

    References: Li, Liu, Lian, Yang, Dong, Kang, Zhang, Keutzer 2023, arXiv:2302.04304 (Q-Diffusion); rounding: Nagel et
    al. 2020, arXiv:2004.10568; blocks: Li et al. 2021, arXiv:2102.05426; branch: Li et al. 2024, arXiv:2411.05007.
    """

    weights: int = 8
    acts: int | None = 8
    ranges: Literal["search", "minmax"] = "search"
    rounding: Literal["nearest", "adaround"] = "nearest"
    learn_steps: bool = False
    iterations: int = 300
    rate: float = 0.1
    split: bool = True
    rank: int = 0
    groups: int | None = None
    correct: bool | None = None
    keep: tuple[str, ...] = ENDS
    eight: float = 0.0
    images: int = 16
    steps: int = 20
    seed: int = FIRST_SEED

    stage: ClassVar[int] = EXCHANGE
    claims: ClassVar[frozenset[str]] = frozenset({"arithmetic"})

    def __post_init__(self) -> None:
        check_bits("weights", self.weights, (8, 4))
        check_bits("acts", self.acts, (8, None))
        for name, least in {"rank": 0, "images": 1, "steps": 1, "iterations": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"quantize: {name} must be at least {least}, found {getattr(self, name)}")
        for name, choices in {"ranges": ("search", "minmax"), "rounding": ("nearest", "adaround")}.items():
            if getattr(self, name) not in choices:
                raise BadInput(f"quantize: {name} must be {' or '.join(choices)}, found {getattr(self, name)!r}")
        if not 0 <= self.eight <= 1:
            raise BadInput(f"quantize: eight is a share of the weights, 0 to 1, found {self.eight}")
        if not self.rate > 0:
            raise BadInput(f"quantize: rate must be positive, found {self.rate}")
        if self.learn_steps and self.acts is None:
            raise BadInput("quantize: learn_steps is about activations, and acts is none")
        if self.groups is not None and self.groups < 1:
            raise BadInput(f"quantize: groups must be at least 1, found {self.groups}")
        if (self.groups or 1) > 1 and self.acts is None:
            raise BadInput(f"quantize: groups={self.groups} is about activations, and acts is none")

    def apply(self, denoiser: nn.Module, ahead: SamplingContext) -> nn.Module:
        """The denoiser with a network in integers; it keeps the weights of what is not exchanged."""
        calls = ahead.calibration("quantize", self.images, self.seed)
        return self.finished(self.work(denoiser, calls))

    def work(self, denoiser: Any, calls: Sequence[Call]) -> QuantizationSession:
        """The network with its weights rounded to the nearest, ready for what is to be learned."""
        if not isinstance(denoiser, Denoiser):
            raise BadInput(f"quantize needs a Denoiser with its network, found {type(denoiser).__name__}")
        if next(layers(denoiser.net), None) is not None:
            raise BadInput("quantize: this network is quantised already")
        names = [name for name, _ in denoiser.net.named_modules()]
        ends = {end: [name for name in names if name.split(".")[-1] == end] for end in ENDS}  # there may be none
        keep = tuple(name for word in self.keep for name in ends.get(word, [word]))
        samples = self.samples(denoiser, calls)
        return QuantizationSession(
            denoiser, samples, self.weights, self.acts, self.ranges, self.split, self.rank,
            len(samples.bounds) + 1, keep, self.eight, batch_of(samples.x.shape), rate=self.rate, seed=self.seed,
        )  # fmt: skip

    def samples(self, denoiser: Denoiser, calls: Sequence[Call]) -> Samples:
        """The calls that the ranges and all that is learned come from."""
        clock = [float(denoiser.time_input(t)) for _, t, _ in calls]
        most = 1 if self.acts is None else min(GROUPS, len(set(clock)))
        return chosen(calls, clock, self.steps, self.seed, bounds(clock, most if self.groups is None else self.groups))

    def finished(self, work: QuantizationSession, book: SessionProgress | None = None) -> Denoiser:
        """What is learned, learned; the denoiser whose network is in integers."""
        book = (
            SessionProgress(iterations={"rounding": self.iterations, "steps": self.iterations})
            if book is None
            else book
        )
        if self.rounding == "adaround":
            work.round(book)
        work.fit()
        if self.learn_steps:
            work.learn(book)
        if self.rounding == "nearest" if self.correct is None else self.correct:
            work.correct()
        net = work.made()
        return work.denoiser.replace(net=TimeGroups(net, work.samples.bounds) if work.groups > 1 else net)


def batch_of(shape: Sequence[int]) -> int:
    """Rows of samples (N, C, H, W) that the network is asked at once: fewer of large ones."""
    return max(1, min(BATCH, PLACES // max(math.prod(shape[2:]), 1)))
