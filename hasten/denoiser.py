"""Denoiser: a network with its schedule and prediction, asked for the clean sample. The one type everybody shares."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BadInput, HastenError, check_int, check_number, nearest
from .predictions import Prediction, prediction_from, spread
from .schedules.base import Schedule

__all__ = ["Denoiser", "Wrapper"]

CLOCKS = ("t", "t1000", "t999", "index", "log_sigma4", "lam")
CACHED_TIMES = 4096
SLACK = 1e-9  # of a time, for rounding
EVALUATION_METHODS = ("raw", "moments")  # methods that answer about x_t, beside `forward`


class Denoiser(nn.Module):
    """`x0 = c_skip x_t + c_out net(c_in x_t, clock(t), **cond)`, the network's estimate of the clean sample.

    Coefficients are computed in float64 and applied in the dtype of `x_t`; the network is given its own floating
    dtype (or what autocast makes of it), and the answer has the dtype of `x_t`. Coefficients of single times are kept:
    to change the schedule or the prediction, make another with `replace`.

    Args:
        net: called as `net(input (B, *S), time (B,) float32, **cond) -> raw (B, *S)`.
        schedule: what `t` in [0, 1] means.
        prediction: what the raw output means, or its name: "eps", "x0", "v", "flow", "edm".
        clock: the network's own time input: "t" (0 to 1), "t" and a number for that multiple of it ("t1000", "t999"),
            "index" (the fractional index of a `Discrete` table), "log_sigma4" (ln(sigma / alpha) / 4, as EDM) or "lam".
        null_label: the label that means "no class", which guidance needs; by default the network's own `null_label`.
        guidance_range: of a distilled student: the guidance scales (low, high) that it can give. By default those that
            the network takes as its input `guidance`; equal ones where one scale is built in; None: not a student, and
            guidance is two evaluations.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        prediction: Prediction | str,
        clock: str = "t",
        null_label: int | None = None,
        guidance_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            found = f"the class {net.__name__}" if isinstance(net, type) else type(net).__name__
            raise BadInput(f"Denoiser needs a network, an nn.Module, found {found}")
        if not isinstance(schedule, Schedule):
            found = f"the class {schedule.__name__}" if isinstance(schedule, type) else type(schedule).__name__
            raise BadInput(f"Denoiser needs a Schedule, such as VPLinear(), found {found}")
        if not isinstance(clock, str):
            raise BadInput(f"clock must be a text, such as 't1000', found {clock!r}")
        if not (clock in CLOCKS or re.fullmatch(r"t\d+(\.\d+)?", clock)):
            raise BadInput(f"unknown clock {clock!r}: {nearest(clock, CLOCKS)}")
        if clock == "index" and not hasattr(schedule, "index"):
            raise BadInput(f'clock "index" needs a Discrete schedule, found {type(schedule).__name__}')
        self.net = net
        self._fixed = (schedule, prediction_from(prediction), clock)
        self.null_label = (
            getattr(net, "null_label", None) if null_label is None else check_int("null_label", null_label, 0)
        )
        own = getattr(net, "guidance_range", None)
        self.guidance_range = own if guidance_range is None else _range(guidance_range)
        self._at: dict[float, tuple[float, float, float, float]] = {}

    @property
    def schedule(self) -> Schedule:
        """What `t` means. Coefficients are kept, so it cannot be assigned: `replace(schedule=...)`."""
        return self._fixed[0]

    @property
    def prediction(self) -> Prediction:
        """What the raw output means; `replace(prediction=...)`."""
        return self._fixed[1]

    @property
    def clock(self) -> str:
        """The network's own time input; `replace(clock=...)`."""
        return self._fixed[2]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("schedule", "prediction", "clock"):
            raise FixedAttribute(
                f"the {name} of a Denoiser cannot be assigned: make another with denoiser.replace({name}=...)"
            )
        super().__setattr__(name, value)

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The clean sample x0 (B, *S).

        Args:
            x_t: (B, *S), noisy. t: () or (B,), in [0, 1]. cond: passed to the network as keywords.

        Raises:
            BadInput: for a time outside [0, 1]. Times on another device than the CPU are not looked at: that would wait
                for it.
            HastenError: for an "eps" network at a time where alpha = 0: what it says there holds nothing of x0.
        """
        c_in, c_skip, c_out, clock = self._coefficients(t, x_t)
        return _clean(x_t, self._net(x_t, c_in, clock, cond), c_skip, c_out)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """What the network says, (B, *S), in the dtype of `x_t`: the quantity that `prediction` names."""
        c_in, _, _, clock = self._coefficients(t, x_t, need_x0=False)
        return self._net(x_t, c_in, clock, cond)

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The seam in the middle of the network: `(middle, finish)`, with `finish(middle)` what `forward` returns.

        middle: (B, C, h, w), the features where the contracting half ends. `finish(changed)` runs the expanding half on
        other ones and returns x0 (B, *S); it may be called again, and needs no gradient.

        Raises:
            HastenError: for a network without `embed`, `encode` and `decode`.
        """
        if not all(callable(getattr(self.net, name, None)) for name in ("embed", "encode", "decode")):
            raise HastenError(
                f"{type(self.net).__name__} has no middle features to steer: what works is a network with embed, "
                "encode and decode, such as hasten's UNet"
            )
        c_in, c_skip, c_out, clock = self._coefficients(t, x_t)
        net_input, time = self._inputs(x_t, c_in, clock)
        emb = self.net.embed(time, **cond)  # type: ignore[operator]
        skips, middle = self.net.encode(net_input, emb)  # type: ignore[operator]

        def finish(changed: Tensor) -> Tensor:
            raw = self.net.decode(skips, changed, emb)  # type: ignore[operator]
            return _clean(x_t, raw.to(x_t.dtype), c_skip, c_out)

        return middle, finish

    def time_input(self, t: Tensor | float) -> Tensor:
        """The network's own time, float64, of the shape of `t`."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.clock == "index":
            return self.schedule.index(t)  # type: ignore[attr-defined]
        if self.clock == "lam":
            return self.schedule.lam(t)
        if self.clock == "log_sigma4":
            return -0.25 * self.schedule.lam(t)
        return t * float(self.clock[1:] or 1)

    @property
    def net_takes_guidance(self) -> bool:
        """Whether the network must be given `guidance`, the scale of each sample (B,)."""
        return getattr(self.net, "guidance_range", None) is not None

    @property
    def step_counts(self) -> tuple[int, ...] | None:
        """The counts of steps of which the network must be told one, as `steps` (B,); None where it takes none."""
        return getattr(self.net, "step_counts", None)

    def condition_names(self) -> frozenset[str] | None:
        """The conditions that the network can be given; None where its signature does not say (`**keywords`)."""
        if type(self) is not Denoiser or hasattr(self.net, "_orig_mod"):
            return None
        try:
            parameters = list(inspect.signature(self.net.forward).parameters.values())
        except (TypeError, ValueError):
            return None
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters) or len(parameters) < 2:
            return None
        return frozenset(p.name for p in parameters[2:])

    def replace(self, **changes: Any) -> Denoiser:
        """The same denoiser with some of its constructor's arguments changed; what is not named is shared."""
        keys = ("net", "schedule", "prediction", "clock", "null_label", "guidance_range")
        unknown = set(changes) - set(keys)
        if unknown:
            raise BadInput(f"Denoiser has no argument {min(unknown)!r}: {nearest(min(unknown), keys)}")
        new = Denoiser(**{key: changes.get(key, getattr(self, key)) for key in keys})
        untrained = self.null_label is None and getattr(self.net, "null_label", None) is not None
        if untrained and "null_label" not in changes:  # the network has a row for it, which was never trained
            new.null_label = None
        return new.train(self.training)

    def _net(self, x_t: Tensor, c_in: Tensor | float | None, clock: Tensor | float, cond: dict[str, Any]) -> Tensor:
        raw = self.net(*self._inputs(x_t, c_in, clock), **cond)
        # another shape would be broadcast; inside pipelines some networks take, or give, further channels (`whole`)
        if not isinstance(raw, Tensor) or (raw.shape != x_t.shape and not getattr(self.net, "whole", False)):
            found = f"a tensor of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise BadInput(
                f"{type(self.net).__name__} must return one tensor of the shape of its samples, {tuple(x_t.shape)}, "
                f"it returned {found}"
            )
        return raw.to(x_t.dtype)

    def _inputs(self, x_t: Tensor, c_in: Tensor | float | None, clock: Tensor | float) -> tuple[Tensor, Tensor]:
        """What the network is given: c_in x_t in its own dtype, and its time (B,) float32."""
        said = getattr(self.net, "dtype", None)  # weights may be stored in fewer bits than the network computes in
        if isinstance(said, torch.dtype) and said.is_floating_point:
            dtype = said
        else:
            dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x_t.dtype)
        if isinstance(c_in, Tensor):
            c_in = spread(c_in, x_t)
        elif c_in == 1.0:
            c_in = None
        net_input = x_t if c_in is None else x_t * c_in
        if isinstance(clock, float):
            time = torch.full((len(x_t),), clock, dtype=torch.float32, device=x_t.device)
            time.host_times = (clock,)  # type: ignore[attr-defined]  # for networks that choose by the time, without a wait
        else:
            time = clock.to(x_t.device, torch.float32).expand(len(x_t))
        return net_input.to(dtype), time

    def _coefficients(self, t: Tensor | float, x_t: Tensor, need_x0: bool = True) -> tuple[Any, Any, Any, Any]:
        """c_in, c_skip, c_out and clock: floats for one time without a gradient, else float64 tensors."""
        if not isinstance(t, (Tensor, float, int)):
            t = self._time(t)
        if not isinstance(x_t, Tensor) or not x_t.ndim:
            kind = "a tensor of no dimensions" if isinstance(x_t, Tensor) else type(x_t).__name__
            raise BadInput(f"x_t must be a tensor (B, *S), found {kind}")
        if isinstance(t, Tensor) and (t.ndim or t.requires_grad):
            if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x_t))):
                raise BadInput(f"t must be one time or one a sample ({len(x_t)}), found shape {tuple(t.shape)}")
            t = t.cpu() if t.device.type == "mps" else t  # which has no float64
            t = t.to(torch.float64)
            if t.device.type == "cpu" and not bool(((t >= -SLACK) & (t <= 1 + SLACK)).all()):
                outside = t.detach()[~((t >= -SLACK) & (t <= 1 + SLACK))]
                self._refuse_time(float(outside.flatten()[0]))
            alpha = self.schedule.alpha(t)
            ends = need_x0 and self.prediction.name == "eps" and self.schedule.zero_snr  # else alpha is never 0
            if ends and bool((alpha.detach() == 0).any()):
                self._refuse(1.0)
            return *self.prediction.coefficients(alpha, self.schedule.sigma(t)), self.time_input(t)
        key = float(t)
        if key not in self._at:
            if not -SLACK <= key <= 1 + SLACK:
                self._refuse_time(key)
            if len(self._at) >= CACHED_TIMES:
                self._at.clear()
            at = torch.tensor(key, dtype=torch.float64)
            known = *self.prediction.coefficients(self.schedule.alpha(at), self.schedule.sigma(at)), self.time_input(at)
            self._at[key] = tuple(float(c) for c in known)  # type: ignore[assignment]
        found = self._at[key]
        if need_x0 and self.prediction.name == "eps" and abs(found[2]) == float("inf"):
            self._refuse(key)
        return found

    @staticmethod
    def _time(t: Any) -> Tensor:
        """A time that is an array, a list or a number of NumPy."""
        try:
            listed = isinstance(t, (list, tuple)) or hasattr(t, "__array__")
            return torch.as_tensor(np.asarray(t, dtype=np.float64) if listed else None)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(f"t must be a number, a tensor or an array of times in [0, 1], found {t!r}") from None

    def _refuse_time(self, t: float) -> None:
        table = getattr(self.schedule, "alphas_cumprod", None)
        N = len(table) if table else 1000
        hint = f"for entry i of a table of {N} give t = (i + 1) / {N}"
        if float(t).is_integer() and 0 <= t < N:
            hint += f", here {(t + 1) / N:g}"
        raise BadInput(f"t must lie in [0, 1] (0 the image, 1 the noise), found {t:g}: {hint}")

    def _refuse(self, t: float) -> None:
        raise HastenError(
            f"an eps-prediction network says nothing about the image at t = {t:g}, where alpha = 0: "
            "start below it (a time grid's start=), or use a network that predicts v, x0 or flow"
        )


def device_of(net: nn.Module) -> torch.device:
    """Where the weights of a network are, or else its buffers; the CPU where it has neither."""
    first = next(net.parameters(), None)
    first = next(net.buffers(), None) if first is None else first
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode (no dropout, norms that stay as they are); afterwards as it was, part by part."""
    parts = [part for part in net.modules() if part.training]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part in parts:
            part.training = True


def _range(given: Any) -> tuple[float, float]:
    """A range of guidance scales, (low, high)."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise BadInput(f"guidance_range must be two numbers, (low, high), found {given!r}")
    low, high = (check_number("guidance_range", value) for value in given)
    if low > high:
        raise BadInput(f"guidance_range must be (low, high), found {given!r}")
    return low, high


def _clean(x_t: Tensor, raw: Tensor, c_skip: Tensor | float, c_out: Tensor | float) -> Tensor:
    """`c_skip x_t + c_out raw`, without the products that are none."""
    if isinstance(c_skip, float):
        if c_skip == 0.0:
            return raw * c_out if c_out != 1.0 else raw.clone()  # the network may write its next answer over this one
        return torch.add(x_t * c_skip, raw, alpha=c_out)  # type: ignore[arg-type]
    return spread(c_skip, x_t) * x_t + spread(c_out, x_t) * raw


class FixedAttribute(BadInput, AttributeError):
    """An attribute that others were computed from is assigned."""


class NotForwarded(HastenError, AttributeError):
    """A wrapper is asked for an answer that it would not change as it does those of `forward`."""


class Wrapper(nn.Module):
    """A denoiser around another one. What it does not define (`schedule`, `prediction`, ...) is the inner denoiser's.

    A subclass that keeps something from one query to the next defines `reset()`, which is called before a trajectory.
    One whose `forward` does something and that can be steered from outside defines `features` to do it there too; and
    `raw` and `moments`, where they are asked for: the inner ones would leave out what `forward` does. With a class
    attribute `takes_rows = True` it is given `rows` (R,) where a query is about some samples of the batch only.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S); what a subclass changes."""
        return self.denoiser(x_t, t, **cond)

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The inner denoiser's seam, where this wrapper's `forward` is the inner denoiser's too."""
        if type(self).forward is not Wrapper.forward:  # what it does there would silently be left out
            raise HastenError(
                f"{type(self).__name__} cannot be steered from outside by its middle features: "
                "name the guide that steers them before it"
            )
        return self.denoiser.features(x_t, t, **cond)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in EVALUATION_METHODS and type(self).forward is not Wrapper.forward:
                raise NotForwarded(
                    f"{type(self).__name__} changes what its denoiser answers, and does not define {name!r}"
                ) from None
            return getattr(super().__getattr__("denoiser"), name)


def reset(denoiser: Any) -> None:
    """Tell every module inside that a new trajectory begins: each class that defines `reset` has it called once."""
    if isinstance(denoiser, nn.Module):
        for module in denoiser.modules():
            if callable(getattr(type(module), "reset", None)):
                module.reset()  # type: ignore[operator]
