"""A denoiser that keeps features from one query to the next: which query this is, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...denoiser import Denoiser, Wrapper, to_x0
from ...errors import BadInput
from .seams import drawn, same, tiled

TOLERANCE = 1e-9  # of times: a query is the one that was foretold


class Keyed(Wrapper):
    """The part that feature reuse has in common. A subclass defines `full` and `partial`, in raw outputs.

    At a key the whole network is run (`full`) and its features are kept; at the other queries `partial` is run with
    what was kept, the query's own time and conditions. A query whose conditions or batch are not those of the key
    before it is made a key, and so is the first.

    Attributes:
        keys, times: of the queries, by their number.
        encoder_calls: how often the part that keys run was run; decoder_calls: how often the part that every query
            needs; queries: how many were answered. All since the wrapper was made.
    """

    def __init__(
        self, denoiser: Denoiser, who: str, times: Sequence[float], keys: tuple[int, ...], forecast: int
    ) -> None:
        super().__init__(denoiser)
        if forecast not in (0, 1):
            raise BadInput(f"{who}: forecast is 0 (hold) or 1 (a line through the last two keys), found {forecast}")
        self.who, self.times, self.keys, self.forecast = who, tuple(times), keys, forecast
        at = torch.tensor(self.times, dtype=torch.float64)
        self.angle = torch.atan2(denoiser.schedule.sigma(at), denoiser.schedule.alpha(at)).tolist()
        self._is_key = frozenset(keys)
        self.encoder_calls = self.decoder_calls = self.queries = 0
        self.reset()

    def reset(self) -> None:
        """A new trajectory begins: what was kept is let go."""
        self._at = 0
        self._cond: Any = None
        self._rows: torch.Size | None = None
        self._kept: list[tuple[int, Any]] = []  # (query, features) of the last two keys

    def full(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at query k, a key; keeps its features with `keep`."""
        raise NotImplementedError

    def partial(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at query k, with what is kept."""
        raise NotImplementedError

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """x0 (B, *S). Raises BadInput for a time that is not the one of this query."""
        raw, (_, c_skip, c_out, _) = self._answer(x_t, t, cond, need_x0=True)
        return to_x0(x_t, raw, c_skip, c_out)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The network's own output (B, *S); a query like any other."""
        return self._answer(x_t, t, cond, need_x0=False)[0]

    def expected_speedup(self, share: float) -> float:
        """1 / (1 - share (1 - keys / queries)): what is gained where time goes with multiply-accumulates.

        share: of the network's, in the part that only keys run (0 to 1).
        """
        return 1 / (1 - share * (1 - len(self.keys) / len(self.times)))

    def keep(self, k: int, features: Any) -> None:
        self._kept = [*self._kept[-1:], (k, features)] if self.forecast else [(k, features)]

    def recalled(self, steps: Sequence[int]) -> Any:
        """The features for these queries, one after the other along the batch.

        Forecast: F_i + r (F_i - F_p), r = (a_k - a_i) / (a_i - a_p), for the last keys p < i and the angle
        a = atan2(sigma, alpha), by which the input turns from data to noise; but a hold as long as p would be query 0:
        from the starting noise the features do not set out along a line.
        """
        i, newer = self._kept[-1]
        if self.forecast and len(self._kept) == 2 and self._kept[0][0] > 0:
            p, older = self._kept[0]
            if self.angle[i] != self.angle[p]:
                turn = self.angle[i] - self.angle[p]
                return drawn(older, newer, [(self.angle[k] - self.angle[i]) / turn for k in steps])
        return tiled(newer, len(steps))

    def clocks(self, steps: Sequence[int], x_t: Tensor) -> Tensor:
        """The network's times at these queries, each for the whole batch: (len(steps) B,) float32."""
        own = [self.denoiser._coefficients(self.times[k], x_t, need_x0=False)[3] for k in steps]  # type: ignore[operator]
        made = [torch.full((len(x_t),), clock, dtype=torch.float32, device=x_t.device) for clock in own]
        clocks = made[0] if len(made) == 1 else torch.cat(made)  # without a copy to the device, which would wait
        clocks.host_times = tuple(own)  # type: ignore[attr-defined]  # see `TimeGroups`
        return clocks

    def _answer(
        self, x_t: Tensor, t: Tensor | float, cond: dict[str, Any], need_x0: bool
    ) -> tuple[Tensor, tuple[Any, Any, Any, Any]]:
        k = self._number(t)
        coefficients = self.denoiser._coefficients(t, x_t, need_x0=need_x0)  # type: ignore[operator]
        net_input, time = self.denoiser._inputs(x_t, coefficients[0], coefficients[3])  # type: ignore[operator]
        if self._rows != x_t.shape or not same(self._cond, cond):
            self._kept.clear()
        answer = self.full if k in self._is_key or not self._kept else self.partial
        raw = answer(k, net_input, time, cond)
        self._at, self._cond, self._rows = k + 1, cond, x_t.shape
        self.queries += 1
        return raw.to(x_t.dtype), coefficients

    def _number(self, t: Tensor | float) -> int:
        """Which query this is."""
        k = self._at
        if k >= len(self.times):
            raise BadInput(f"{self.who} was made for {len(self.times)} queries and is asked for more: reset() it first")
        asked = torch.as_tensor(t, dtype=torch.float64)
        if not bool((asked - self.times[k]).abs().max() <= TOLERANCE):
            found = f"t = {float(asked):.9g}" if asked.numel() == 1 else "several times at once"
            raise BadInput(
                f"{self.who} was made for t = {self.times[k]:.9g} at query {k}, found {found}: "
                "use the sampler and steps that it was told"
            )
        return k


def inner(denoiser: nn.Module, who: str) -> Denoiser:
    """The denoiser, if its network is at hand."""
    if not isinstance(denoiser, Denoiser):
        raise BadInput(
            f"{who} reuses features of a network: it works on a hasten.Denoiser, found {type(denoiser).__name__}"
        )
    return denoiser
