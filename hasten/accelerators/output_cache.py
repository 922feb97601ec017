"""Output-level caches: where little changes, the network does not run and its last output is reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Wrapper, to_x0
from ..errors import BadInput, check_choice, check_numbers
from ..predictions import Prediction, spread
from . import WRAP, Accelerator, SamplingContext
from ._caching.split import same_conditions

__all__ = ["RULES", "OutputCache", "OutputCached"]

RULES = {"teacache": "output", "easycache": "difference"}  # and what they reuse, see `cached_plan`


@dataclass(frozen=True)
class OutputCache(Accelerator):
    """The network's last output is reused as long as a running estimate of its change stays below a threshold.

        E <- E + d_k;   E < threshold: reuse;   else run the network, E <- 0

        "teacache":   d_k = p(|z_k - z_{k-1}|_1 / |z_{k-1}|_1),                    raw_k = raw_j
        "easycache":  d_k = r |z_k - z_{k-1}|_1 / |raw_j|_1,                       raw_k = raw_j + z_k - z_j

    z is the network's input, j the last evaluation at which it ran, r the ratio |raw_j - raw_i|_1 / |z_j - z_i|_1 of
    the last two at which it ran, p a polynomial. The first `warmup` evaluations and the last are computed, and those
    whose conditions or batch differ from the ones before.

    A decision is that of the whole batch: images depend on which others they are sampled with, and every decision waits
    for the device. `hasten tune --method cached_plan` makes a plan of it, which has neither property, and which a
    fitted plan of as many evaluations is compared with. TeaCache itself looks at the input of the first block after its
    modulation by the time, and reuses what the blocks add; here both are the network's own input and output.

    Args:
        threshold: of the accumulated change; 0: the network always runs.
        rule: "easycache" or "teacache".
        warmup: how many evaluations at the beginning are computed; at least 2 for "easycache".
        rescale: coefficients of p, highest power first, as they are published for TeaCache.

    References:
        Liu, Zhang, Wang, Wei, Qiu, Zhao, Zhang, Ye, Wan 2024, arXiv:2411.19108 (TeaCache); Zhou, Liang, Chen, Feng,
        Chen, Lin, Ding, Tan, Zhao, Bai 2025, arXiv:2507.02860 (EasyCache).
    """

    threshold: float = 0.05
    rule: str = "easycache"
    warmup: int = 2
    rescale: tuple[float, ...] = (1.0, 0.0)
    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})
    negative: ClassVar[tuple[str, ...]] = ("rescale",)

    def __post_init__(self) -> None:
        check_choice("output_cache rule", self.rule, tuple(RULES))
        if not self.threshold >= 0:
            raise BadInput(f"output_cache: threshold is 0 or more, found {self.threshold:g}")
        least = 2 if self.rule == "easycache" else 1
        if self.warmup < least:
            raise BadInput(f"output_cache: warmup of {self.rule} is {least} or more, found {self.warmup}")
        if not self.rescale:
            raise BadInput("output_cache: rescale holds one coefficient or more, found none")
        check_numbers(self)

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser that reuses its outputs.

        Raises:
            BadInput: for one without a prediction, whose output has no meaning that could be reused.
        """
        if not isinstance(getattr(denoiser, "prediction", None), Prediction):
            raise BadInput(
                "output_cache reuses the raw output of a network: it works on a hasten.Denoiser, found "
                f"{type(denoiser).__name__}"
            )
        return OutputCached(denoiser, self, None if context.times is None else len(context.times))


class OutputCached(Wrapper):
    """A denoiser under `OutputCache`, of the same signature.

    Args:
        denoiser: with a `schedule`; any module of a denoiser's signature where `prediction` is given.
        method: the rule and its threshold.
        queries: the number of model evaluations, of which the last is computed; None: unknown.
        prediction: what is reused is the output in these terms; by default the denoiser's own.

    Attributes:
        computed: numbers of the evaluations of this trajectory at which the network ran.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        method: OutputCache,
        queries: int | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        super().__init__(denoiser)
        self.method, self.queries = method, queries
        self._terms: Prediction = self.denoiser.prediction if prediction is None else prediction
        self.reset()

    def reset(self) -> None:
        """Drop the cached output: a new trajectory begins."""
        self.computed: list[int] = []
        self._at = 0
        self._change = 0.0
        self._rate: float | None = None
        self._input: Tensor | None = None  # of the evaluation before
        self._saved: tuple[Tensor, Tensor] | None = None  # input and raw output of the last computed one
        self._cond: Any = None

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The clean sample x0 (B, *S)."""
        raw, (_, c_skip, c_out) = self._evaluate(x_t, t, cond)
        return to_x0(x_t, raw, c_skip, c_out)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The network's own output (B, *S), computed or reused."""
        return self._evaluate(x_t, t, cond)[0]

    def _evaluate(self, x_t: Tensor, t: Tensor | float, cond: dict[str, Any]) -> tuple[Tensor, tuple[Any, Any, Any]]:
        """The raw output in the dtype of `x_t`, and the coefficients of the prediction."""
        at = torch.as_tensor(t.cpu() if isinstance(t, Tensor) else t, dtype=torch.float64)  # MPS has no float64
        schedule = self.denoiser.schedule
        numbers = self._terms.coefficients(schedule.alpha(at), schedule.sigma(at))
        c_in, c_skip, c_out = (float(c) for c in numbers) if at.ndim == 0 else (spread(c, x_t) for c in numbers)
        z = x_t if isinstance(c_in, float) and c_in == 1.0 else (c_in * x_t).to(x_t.dtype)
        if self._saved is not None and not self._must_run(z, cond):
            before, raw = self._saved
            raw = raw if RULES[self.method.rule] == "output" else _shifted(raw, z - before)
        else:
            raw = self._run(x_t, t, cond, c_skip, c_out)
            self._measure(z, raw)
            self.computed.append(self._at)
        self._input, self._cond, self._at = z, cond, self._at + 1
        return raw, (c_in, c_skip, c_out)

    def _run(self, x_t: Tensor, t: Tensor | float, cond: dict[str, Any], c_skip: Any, c_out: Any) -> Tensor:
        """The network's output now; of a denoiser that returns x0 only, what that means."""
        if isinstance(self.denoiser, Denoiser) and self._terms == self.denoiser.prediction:
            return self.denoiser.raw(x_t, t, **cond)
        x0 = self.denoiser(x_t, t, **cond).to(x_t.dtype)
        return ((x0 - c_skip * x_t) / c_out).to(x_t.dtype)

    def _must_run(self, z: Tensor, cond: dict[str, Any]) -> bool:
        """Whether this evaluation is computed; adds to the accumulated change."""
        method, last = self.method, self._input
        if last is None or self._saved is None or last.shape != z.shape or not same_conditions(self._cond, cond):
            self._rate = self._saved = None
            return True
        if self._at < method.warmup or (self.queries is not None and self._at >= self.queries - 1):
            return True
        if method.rule == "teacache":
            step, size = _means(z - last, last)
            self._change += _polynomial(method.rescale, step / size)
        elif self._rate is None:
            return True
        else:
            step, size = _means(z - last, self._saved[1])
            self._change += self._rate * step / size
        return not self._change < method.threshold

    def _measure(self, z: Tensor, raw: Tensor) -> None:
        """After a run of the network: its rate of change, and no accumulated change."""
        if self._saved is not None and self._saved[0].shape == z.shape:
            changed, moved = _means(raw - self._saved[1], z - self._saved[0])
            self._rate = changed / moved
        self._saved, self._change = (z, raw.clone()), 0.0  # a network may use its output buffer again


def _shifted(raw: Tensor, change: Tensor) -> Tensor:
    """`raw + change`; further channels of a learned variance stay as they are."""
    channels = change.shape[1] if change.ndim > 1 else 0
    if raw.shape == change.shape:
        return raw + change
    return torch.cat([raw[:, :channels] + change, raw[:, channels:]], 1)


def _means(*tensors: Tensor) -> list[float]:
    """The mean magnitudes of tensors, above 0, as numbers of this process: it waits once for the device."""
    means = torch.stack([x.abs().mean(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors])
    values: list[float] = means.clamp_min(1e-30).tolist()
    return values


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    """The polynomial at x, its highest power first."""
    total = 0.0
    for c in coefficients:
        total = total * x + c
    return total
