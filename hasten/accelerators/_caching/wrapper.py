"""`FeatureReuse`: a denoiser that reuses features of key steps at the model evaluations after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...denoiser import Denoiser, Wrapper, to_x0
from ...errors import BadInput
from .forecast import Extrapolation, angles, combine_features
from .split import same_conditions

__all__ = ["FeatureReuse", "require_denoiser"]

TOLERANCE = 1e-9  # of times: within it a model evaluation is the one that was planned


class FeatureReuse(Wrapper):
    """What the feature-reusing denoisers have in common. A subclass defines `full` and `partial`, in raw outputs.

    At a key step the whole network runs (`full`) and its features are cached; at the others `partial` runs with the
    cached features and its own time and conditions. An evaluation whose conditions or batch differ from the one before
    is treated as a key step, and so is the first.

    Args:
        denoiser: whose network it is.
        who: the accelerator, for messages.
        times: t of all model evaluations, in order.
        keys: numbers of the key steps, from 0.
        extrapolation: how the features of earlier key steps are continued; None: they are reused.

    Attributes:
        encoder_calls: how often the part that only key steps need has run, since the wrapper was made.
        decoder_calls: how often the part that every evaluation needs has run.
        queries: the number of model evaluations.
    """

    denoiser: Denoiser

    def __init__(
        self,
        denoiser: Denoiser,
        who: str,
        times: Sequence[float],
        keys: tuple[int, ...],
        extrapolation: Extrapolation | None = None,
    ) -> None:
        super().__init__(denoiser)
        self.who, self.times, self.keys = who, tuple(times), keys
        self.extrapolation = extrapolation or Extrapolation(0, angles(times, denoiser.schedule))
        self._is_key = frozenset(keys)
        self.encoder_calls = self.decoder_calls = self.queries = 0
        self.reset()

    def reset(self) -> None:
        """Drop the cached features: a new trajectory begins."""
        self._at = 0
        self._cond: Any = None
        self._rows: torch.Size | None = None
        self._cache: list[tuple[int, Any]] = []  # (evaluation, features) of the last key steps

    def full(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at evaluation k, a key step; caches its features with `store`."""
        raise NotImplementedError

    def partial(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at evaluation k, from cached features."""
        raise NotImplementedError

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The clean sample x0 (B, *S).

        Raises:
            BadInput: for a time that is not the planned one.
        """
        raw, (_, c_skip, c_out, _) = self._evaluate(x_t, t, cond, need_x0=True)
        return to_x0(x_t, raw, c_skip, c_out)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The network's own output (B, *S); a model evaluation like any other."""
        return self._evaluate(x_t, t, cond, need_x0=False)[0]

    def expected_speedup(self, fraction: float) -> float:
        """The speedup `1 / (1 - fraction (1 - keys / evaluations))`, if time is proportional to their number.

        Args:
            fraction: of the network's multiply-accumulates that only key steps spend, 0 to 1.
        """
        return 1 / (1 - fraction * (1 - len(self.keys) / len(self.times)))

    @property
    def next_is_key(self) -> bool:
        """Whether the next evaluation is a key step, as long as its conditions are those of the last one."""
        return not self._cache or self._at in self._is_key

    def store(self, k: int, features: Any) -> None:
        """Cache the features of key step k, and those of the key steps before that the extrapolation uses."""
        earlier = self._cache[-(self.extrapolation.history - 1) :] if self.extrapolation.history > 1 else []
        self._cache = [*earlier, (k, features)]

    def features_at(self, steps: Sequence[int]) -> Any:
        """The features for these evaluations, continued from the cached ones and concatenated along the batch."""
        nodes = tuple(i for i, _ in self._cache)
        weights = [self.extrapolation.weights(k, nodes) for k in steps]
        return combine_features([features for _, features in self._cache], weights)

    def net_times(self, steps: Sequence[int], x_t: Tensor) -> Tensor:
        """The network's times at several evaluations, each for all rows of the batch.

        Args:
            steps: numbers of the evaluations.
            x_t: (B, *S), for the batch size and the device.

        Returns:
            (len(steps) B,) float32.
        """
        clocks = [self.denoiser._coefficients(self.times[k], x_t, need_x0=False)[3] for k in steps]
        rows = [torch.full((len(x_t),), clock, dtype=torch.float32, device=x_t.device) for clock in clocks]
        times = rows[0] if len(rows) == 1 else torch.cat(rows)  # without a copy to the device, which would synchronise
        times.host_times = tuple(clocks)  # type: ignore[attr-defined]  # see `TimeGroups`
        return times

    def _evaluate(
        self, x_t: Tensor, t: Tensor | float, cond: dict[str, Any], need_x0: bool
    ) -> tuple[Tensor, tuple[Any, Any, Any, Any]]:
        """The raw output in the dtype of `x_t`, and the denoiser's coefficients."""
        k = self._number(t)
        coefficients = self.denoiser._coefficients(t, x_t, need_x0=need_x0)
        net_input, time = self.denoiser._inputs(x_t, coefficients[0], coefficients[3])
        if self._rows != x_t.shape or not same_conditions(self._cond, cond):
            self._cache.clear()
        run = self.full if k in self._is_key or not self._cache else self.partial
        raw = run(k, net_input, time, cond)
        self._at, self._cond, self._rows = k + 1, cond, x_t.shape
        self.queries += 1
        return raw.to(x_t.dtype), coefficients

    def _number(self, t: Tensor | float) -> int:
        """The number of this evaluation. Raises BadInput for a time that is not the planned one."""
        k = self._at
        if k >= len(self.times):
            raise BadInput(
                f"{self.who} was made for {len(self.times)} model evaluations, found one more: reset() it first"
            )
        time = torch.as_tensor(t, dtype=torch.float64)
        if not bool((time - self.times[k]).abs().max() <= TOLERANCE):
            found = f"t = {float(time):.9g}" if time.numel() == 1 else "several times at once"
            raise BadInput(
                f"{self.who} was made for t = {self.times[k]:.9g} at model evaluation {k}, found {found}: "
                "use the sampler and steps that it was made for"
            )
        return k


def require_denoiser(denoiser: nn.Module, who: str) -> Denoiser:
    """The denoiser itself.

    Args:
        denoiser: any module.
        who: the accelerator, for the message.

    Raises:
        BadInput: for one that is no `Denoiser`, whose network cannot be reached.
    """
    if not isinstance(denoiser, Denoiser):
        raise BadInput(
            f"{who} reuses features of a network: it works on a hasten.Denoiser, found {type(denoiser).__name__}"
        )
    return denoiser
