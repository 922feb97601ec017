"""Q-Diffusion: weights of 8 or 4 bits, activations of 8, with ranges that fit all times of the sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..nets.prequantized import check_original_weights
from ..nets.quantized import layers
from ..nets.time_groups import TimeGroups
from . import EXCHANGE, FIRST_SEED, Accelerator, Call, SamplingContext
from ._quantization.calibration import Samples, calibration_samples, time_group_bounds
from ._quantization.quantizer import check_bits
from ._quantization.session import ROUNDING, STEPS, QuantizationSession, SessionProgress

__all__ = ["Quantize"]

RANGES, ROUNDINGS = ("search", "minmax"), ("nearest", "adaround")
ENDS = ("conv_in", "conv_out")
GROUPS = 6
INSTEAD = "load it without quantization_config, or use it as it is"
BATCH, PIXELS = 32, 2**17  # the maximum rows of a calibration batch, and of its latents or pixels


@dataclass(frozen=True)
class Quantize(Accelerator):
    """Every convolution and linear layer in integers: `y = bias + s_x s_w conv(u - z_x, q - z_w)`, with

        u = clamp(round(x / s_x) + z_x, 0, 255) of the activations, one range per layer,
        q = clamp(round(w / s_w) + z_w, low, high) of the weights, one range per output channel.

    Attention's products, norms and everything between the layers stay in floating point, and so do grouped and
    one-dimensional convolutions. Which layers are split and which modules are blocks is found by running the network
    once, so that any network is supported (blocks: those of hasten and `diffusers`, else each layer by itself).

    Args:
        weights: 8 bits (symmetric, -127..127) or 4 (with a zero-point, 0..15).
        acts: 8 bits, or none: activations stay in floating point, and only the weights' file is smaller.
        ranges: "search", the range of minimum L_2.4 error among 80 shrunken ones, or "minmax".
        rounding: "nearest", or "adaround": learned block after block on calibration samples, in minutes to hours.
        learn_steps: also learn the step sizes of the activations, block after block.
        iterations: of both, per block.
        rate: the learning rate of AdaRound; the paper's .001 is for 20,000 iterations, not for hundreds.
        split: layers whose input is `cat([h, skip])`, as in a U-Net's decoder, get a range for each of the two, which
            differ much in scale.
        rank: of a floating-point branch that is added to each layer and represents the largest part of its weights; it
            needs no data, and rank (C_in k^2 + C_out) float16 numbers a layer. 0: none.
        groups: of times, each with activation ranges of its own; None: 6, or as many as the sampling has times. They
            cost no time, and reduce the error of 8 bits by 40 %.
        correct: shift the biases by the mean error of rounding per channel; None: where rounding is "nearest". Learned
            rounding compensates its layers' means already, and correcting each of them would undo that.
        keep: names or patterns of modules that stay in floating point. By default conv_in and conv_out (at any depth):
            of the bundled teacher they are 0.2 % of the weights, and with 4-bit weights half of the error of x0.
        eight: the fraction of the weights, 0 to 1, that get 8 bits where `weights` is 4: those of the layers whose 4
            bits change x0 most, for their size. 5.4 % of the bundled teacher's make 70 % of the squared error.
        images: how many are sampled for the calibration.
        steps: the number of evenly spaced time steps that are used of each, all images together.
        seed: of the first image.

    Raises:
        BadInput: for options that are not supported, where nothing can be sampled for calibration, and for a network
            without such layers or quantised before.

    References:
        Li, Liu, Lian, Yang, Dong, Kang, Zhang, Keutzer 2023, arXiv:2302.04304 (Q-Diffusion); rounding: Nagel et al.
        2020, arXiv:2004.10568; blocks: Li et al. 2021, arXiv:2102.05426; branch: Li et al. 2024, arXiv:2411.05007.
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
        for name, minimum in {"rank": 0, "images": 1, "steps": 1, "iterations": 1, "seed": 0}.items():
            if getattr(self, name) < minimum:
                raise BadInput(f"quantize: {name} must be at least {minimum}, found {getattr(self, name)}")
        check_choice("ranges", self.ranges, RANGES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        if not 0 <= self.eight <= 1:
            raise BadInput(f"quantize: eight is a fraction of the weights, 0 to 1, found {self.eight}")
        if not self.rate > 0:
            raise BadInput(f"quantize: rate must be positive, found {self.rate}")
        if self.learn_steps and self.acts is None:
            raise BadInput("quantize: learn_steps is about activations, and acts is none")
        if self.groups is not None and self.groups < 1:
            raise BadInput(f"quantize: groups must be at least 1, found {self.groups}")
        if (self.groups or 1) > 1 and self.acts is None:
            raise BadInput(f"quantize: groups={self.groups} is about activations, and acts is none")

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser with a network in integers; all other modules are shared with the original.

        Raises:
            BadInput: see the class.
        """
        check_original_weights(denoiser, "quantize", INSTEAD)  # before anything is sampled for the calibration
        calls = context.calibration("quantize", self.images, self.seed)
        return self.finish(self.start(denoiser, calls))

    def start(self, denoiser: Any, calls: Sequence[Call]) -> QuantizationSession:
        """A session with the network's weights rounded to the nearest.

        Args:
            denoiser: a `Denoiser`.
            calls: model evaluations for calibration.

        Raises:
            BadInput: see the class.
        """
        if not isinstance(denoiser, Denoiser):
            raise BadInput(f"quantize needs a Denoiser with its network, found {type(denoiser).__name__}")
        if next(layers(denoiser.net), None) is not None:
            raise BadInput("quantize: this network is quantised already")
        check_original_weights(denoiser.net, "quantize", INSTEAD)
        names = [name for name, _ in denoiser.net.named_modules()]
        ends = {end: [name for name in names if name.split(".")[-1] == end] for end in ENDS}  # there may be none
        samples = self.samples(denoiser, calls)
        return QuantizationSession(
            denoiser,
            samples,
            weights=self.weights,
            acts=self.acts,
            ranges=self.ranges,
            split=self.split,
            rank=self.rank,
            groups=len(samples.bounds) + 1,
            exclude=tuple(name for word in self.keep for name in ends.get(word, [word])),
            int8_fraction=self.eight,
            batch=batch_of(samples.x.shape),
            rate=self.rate,
            seed=self.seed,
        )

    def samples(self, denoiser: Denoiser, calls: Sequence[Call]) -> Samples:
        """The calibration samples.

        Args:
            denoiser: whose network's times divide them into groups.
            calls: recorded model evaluations, in order.
        """
        clock = [float(denoiser.time_input(t)) for _, t, _ in calls]
        default = 1 if self.acts is None else min(GROUPS, len(set(clock)))
        bounds = time_group_bounds(clock, default if self.groups is None else self.groups)
        return calibration_samples(calls, clock, self.steps, self.seed, bounds)

    def finish(self, session: QuantizationSession, progress: SessionProgress | None = None) -> Denoiser:
        """Learn what is to be learned.

        Args:
            session: from `start`.
            progress: saves and resumes; by default nothing is saved.

        Returns:
            The denoiser whose network computes with integers.
        """
        if progress is None:
            progress = SessionProgress(iterations={ROUNDING: self.iterations, STEPS: self.iterations})
        if self.rounding == "adaround":
            session.learn_rounding(progress)
        session.fit_ranges()
        if self.learn_steps:
            session.learn_steps(progress)
        if self.rounding == "nearest" if self.correct is None else self.correct:
            session.correct_biases()
        net = session.to_integer()
        return session.denoiser.replace(net=TimeGroups(net, session.samples.bounds) if session.groups > 1 else net)


def batch_of(shape: Sequence[int]) -> int:
    """The batch size for samples of shape (N, C, H, W): at most `BATCH`, fewer of large ones."""
    return max(1, min(BATCH, PIXELS // max(math.prod(shape[2:]), 1)))
