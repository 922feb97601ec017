"""`Denoiser`: a network with its schedule and prediction, which estimates the clean sample. The one shared type."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BadInput, HastenError, check_choice, check_int, check_number, nearest
from .predictions import Prediction, prediction_from, spread
from .schedules.base import Schedule
from .utils.devices import as_float64

__all__ = ["Denoiser", "Wrapper"]

CLOCKS = ("t", "t1000", "t999", "index", "log_sigma4", "lam")
CACHED_TIMES = 4096
SLACK = 1e-9  # tolerance of a time, for rounding
EVALUATION_METHODS = ("raw", "moments", "branch")  # methods other than `forward` that evaluate the network at x_t


class Denoiser(nn.Module):
    """`x0 = c_skip x_t + c_out net(c_in x_t, clock(t), **cond)`, the network's estimate of the clean sample.

    Coefficients are computed in float64 and applied in the dtype of `x_t`; the network's input has its own floating
    dtype (or autocast's), and the result has the dtype of `x_t`. Coefficients of single times are cached: to change the
    schedule or the prediction, make another denoiser with `replace`.

    Args:
        net: called as `net(input (B, *S), time (B,) float32, **cond) -> raw (B, *S)`.
        schedule: what `t` in [0, 1] means.
        prediction: what the raw output means, or its name: "eps", "x0", "v", "flow", "edm".
        clock: the network's own time input: "t" (0 to 1), "t" and a number for that multiple of it ("t1000", "t999"),
            "index" (the fractional index of a `Discrete` table), "log_sigma4" (ln(sigma / alpha) / 4, as EDM) or "lam".
        null_label: the label that means "no class", which guidance needs; by default the network's own `null_label`.
        guidance_range: for a distilled student, its guidance scales (low, high). By default those that the network
            takes as its input `guidance`; equal ones where one scale is built in; None: not a student, and guidance
            is two evaluations.

    Raises:
        BadInput: for a network, schedule, prediction or clock of another kind.
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
        if not re.fullmatch(r"t\d+(\.\d+)?", clock):
            check_choice("clock", clock, CLOCKS)
        if clock == "index" and not hasattr(schedule, "index"):
            raise BadInput(f'clock "index" needs a Discrete schedule, found {type(schedule).__name__}')
        self.net = net
        self._fixed = (schedule, prediction_from(prediction), clock)
        self.null_label: int | None = (
            getattr(net, "null_label", None) if null_label is None else check_int("null_label", null_label, 0)
        )
        own: tuple[float, float] | None = getattr(net, "guidance_range", None)
        self.guidance_range = own if guidance_range is None else _check_range(guidance_range)
        # channels K of the image that the network reads as its condition `source` (B, K, H, W); 0: it reads none
        self.source_channels = int(getattr(net, "source_channels", 0))
        self.source_factor = int(getattr(net, "source_factor", 1))  # how many times smaller that image is
        self._cache: dict[float, tuple[float, float, float, float]] = {}

    @property
    def schedule(self) -> Schedule:
        """What `t` means. Its coefficients are cached, so it cannot be assigned: `replace(schedule=...)`."""
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
        """Set an attribute other than the schedule, the prediction and the clock."""
        if name in ("schedule", "prediction", "clock"):
            raise FixedAttribute(
                f"the {name} of a Denoiser cannot be assigned: make another with denoiser.replace({name}=...)"
            )
        super().__setattr__(name, value)

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The clean sample x0 (B, *S).

        Args:
            x_t: noisy samples (B, *S).
            t: the time, () or (B,), in [0, 1].
            cond: conditions, passed to the network as keyword arguments.

        Raises:
            BadInput: for a time outside [0, 1]. Times on a device other than the CPU are not checked: reading them
                would synchronise with it.
            HastenError: for an "eps" network at a time where alpha = 0, whose output there does not determine x0.
        """
        c_in, c_skip, c_out, clock = self._coefficients(t, x_t)
        return to_x0(x_t, self._net(x_t, c_in, clock, cond), c_skip, c_out)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The network's own output (B, *S), in the dtype of `x_t`: what `prediction` names. Args as for `forward`."""
        c_in, _, _, clock = self._coefficients(t, x_t, need_x0=False)
        return self._net(x_t, c_in, clock, cond)

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The network split at its middle: `(middle, finish)`, where `finish(middle)` is what `forward` returns.

        Returns:
            the features (B, C, h, w) at the end of the encoder, and a function that runs the decoder on these or
            changed features and returns x0 (B, *S); it may be called repeatedly, and needs no gradient.

        Raises:
            HastenError: for a network without `embed`, `encode` and `decode`.
        """
        if not all(callable(getattr(self.net, name, None)) for name in ("embed", "encode", "decode")):
            raise HastenError(
                f"{type(self.net).__name__} has no middle features to steer: what works is a network with embed, "
                "encode and decode, such as hasten's UNet"
            )
        net: Any = self.net
        c_in, c_skip, c_out, clock = self._coefficients(t, x_t)
        net_input, time = self._inputs(x_t, c_in, clock)
        emb = net.embed(time, **cond)
        skips, middle = net.encode(net_input, emb)

        def finish(features: Tensor) -> Tensor:
            raw = net.decode(skips, features, emb)
            return to_x0(x_t, raw.to(x_t.dtype), c_skip, c_out)

        return middle, finish

    def time_input(self, t: Tensor | float) -> Tensor:
        """The network's own time input, float64, of the shape of `t`."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.clock == "index":
            table: Any = self.schedule  # a `Discrete`, or another schedule with an `index`
            index: Tensor = table.index(t)
            return index
        if self.clock == "lam":
            return self.schedule.lam(t)
        if self.clock == "log_sigma4":
            return -0.25 * self.schedule.lam(t)
        return t * float(self.clock[1:] or 1)

    @property
    def net_takes_guidance(self) -> bool:
        """Whether the network takes the input `guidance`, the scale of each sample (B,)."""
        return getattr(self.net, "guidance_range", None) is not None

    @property
    def step_counts(self) -> tuple[int, ...] | None:
        """The step counts that the network takes as its input `steps` (B,); None where it has no such input."""
        counts: tuple[int, ...] | None = getattr(self.net, "step_counts", None)
        return counts

    def condition_names(self) -> frozenset[str] | None:
        """The conditions that the network accepts; None where its signature is open (`**keywords`)."""
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
        """The same denoiser with some of its constructor's arguments changed; the others are shared.

        Raises:
            BadInput: for an unknown argument.
        """
        keys = ("net", "schedule", "prediction", "clock", "null_label", "guidance_range")
        unknown = set(changes) - set(keys)
        if unknown:
            raise BadInput(f"Denoiser has no argument {min(unknown)!r}: {nearest(min(unknown), keys)}")
        new = Denoiser(**{key: changes.get(key, getattr(self, key)) for key in keys})
        untrained = self.null_label is None and getattr(self.net, "null_label", None) is not None
        if untrained and "null_label" not in changes:  # the network has an embedding for it, which was never trained
            new.null_label = None
        return new.train(self.training)

    def _net(self, x_t: Tensor, c_in: Tensor | float | None, clock: Tensor | float, cond: dict[str, Any]) -> Tensor:
        """The network's output (B, *S) in the dtype of `x_t`, its shape checked."""
        raw = self.net(*self._inputs(x_t, c_in, clock), **cond)
        # another shape would be broadcast; inside pipelines some networks have further channels (`with_variance`)
        if not isinstance(raw, Tensor) or (raw.shape != x_t.shape and not getattr(self.net, "with_variance", False)):
            found = f"a tensor of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise BadInput(
                f"{type(self.net).__name__} must return one tensor of the shape of its samples, {tuple(x_t.shape)}, "
                f"it returned {found}"
            )
        return raw.to(x_t.dtype)

    def _inputs(self, x_t: Tensor, c_in: Tensor | float | None, clock: Tensor | float) -> tuple[Tensor, Tensor]:
        """The network's inputs: c_in x_t in its own dtype, and its time (B,) float32."""
        own = getattr(self.net, "dtype", None)  # weights may be stored in fewer bits than the network computes in
        if isinstance(own, torch.dtype) and own.is_floating_point:
            dtype = own
        else:
            dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x_t.dtype)
        if isinstance(c_in, Tensor):
            c_in = spread(c_in, x_t)
        elif c_in == 1.0:
            c_in = None
        net_input = x_t if c_in is None else x_t * c_in
        if isinstance(clock, float):
            time = torch.full((len(x_t),), clock, dtype=torch.float32, device=x_t.device)
            # for networks that branch on the time, without a device synchronisation
            time.host_times = (clock,)  # type: ignore[attr-defined]
        else:
            time = clock.to(torch.float32).to(x_t.device).expand(len(x_t))
        return net_input.to(dtype), time

    def _coefficients(self, t: Tensor | float, x_t: Tensor, need_x0: bool = True) -> tuple[Any, Any, Any, Any]:
        """c_in, c_skip, c_out and clock: floats for one time without a gradient, else float64 tensors."""
        if not isinstance(t, (Tensor, float, int)):
            t = self._to_time(t)
        if not isinstance(x_t, Tensor) or not x_t.ndim:
            kind = "a tensor of no dimensions" if isinstance(x_t, Tensor) else type(x_t).__name__
            raise BadInput(f"x_t must be a tensor (B, *S), found {kind}")
        if isinstance(t, Tensor) and (t.ndim or t.requires_grad):
            if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x_t))):
                raise BadInput(f"t must be one time or one a sample ({len(x_t)}), found shape {tuple(t.shape)}")
            t = as_float64(t)
            if t.device.type == "cpu" and not bool(((t >= -SLACK) & (t <= 1 + SLACK)).all()):
                outside = t.detach()[~((t >= -SLACK) & (t <= 1 + SLACK))]
                self._raise_outside(float(outside.flatten()[0]))
            alpha = self.schedule.alpha(t)
            ends = need_x0 and self.prediction.name == "eps" and self.schedule.zero_snr  # else alpha is never 0
            if ends and bool((alpha.detach() == 0).any()):
                self._raise_no_x0(1.0)
            return *self.prediction.coefficients(alpha, self.schedule.sigma(t)), self.time_input(t)
        key = float(t)
        if key not in self._cache:
            if not -SLACK <= key <= 1 + SLACK:
                self._raise_outside(key)
            if len(self._cache) >= CACHED_TIMES:
                self._cache.clear()
            at = torch.tensor(key, dtype=torch.float64)
            c_in, c_skip, c_out = self.prediction.coefficients(self.schedule.alpha(at), self.schedule.sigma(at))
            self._cache[key] = float(c_in), float(c_skip), float(c_out), float(self.time_input(at))
        coefficients = self._cache[key]
        if need_x0 and self.prediction.name == "eps" and abs(coefficients[2]) == float("inf"):
            self._raise_no_x0(key)
        return coefficients

    @staticmethod
    def _to_time(t: Any) -> Tensor:
        """A time that is an array, a list or a NumPy number, as a tensor."""
        try:
            if not (isinstance(t, (list, tuple)) or hasattr(t, "__array__")):
                raise TypeError
            return torch.as_tensor(np.asarray(t, dtype=np.float64))
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(f"t must be a number, a tensor or an array of times in [0, 1], found {t!r}") from None

    def _raise_outside(self, t: float) -> None:
        """Raise BadInput for a time outside [0, 1]."""
        table = getattr(self.schedule, "alphas_cumprod", None)
        N = len(table) if table else 1000
        hint = f"for entry i of a table of {N} give t = (i + 1) / {N}"
        if float(t).is_integer() and 0 <= t < N:
            hint += f", here {(t + 1) / N:g}"
        raise BadInput(f"t must lie in [0, 1] (0 the image, 1 the noise), found {t:g}: {hint}")

    def _raise_no_x0(self, t: float) -> None:
        """Raise HastenError for an eps-prediction network at a time where alpha = 0."""
        raise HastenError(
            f"an eps-prediction network says nothing about the image at t = {t:g}, where alpha = 0: "
            "start below it (a time grid's start=), or use a network that predicts v, x0 or flow"
        )


def device_of(net: nn.Module) -> torch.device:
    """The device of a network's weights, or else of its buffers; the CPU where it has neither."""
    first: Tensor | None = next(net.parameters(), None)
    first = next(net.buffers(), None) if first is None else first
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block (no dropout, frozen norm statistics); each module's own mode is restored."""
    modules = [module for module in net.modules() if module.training]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


def _check_range(value: Any) -> tuple[float, float]:
    """A range of guidance scales, (low, high)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise BadInput(f"guidance_range must be two numbers, (low, high), found {value!r}")
    low, high = (check_number("guidance_range", bound) for bound in value)
    if low > high:
        raise BadInput(f"guidance_range must be (low, high), found {value!r}")
    return low, high


def to_x0(x_t: Tensor, raw: Tensor, c_skip: Tensor | float, c_out: Tensor | float) -> Tensor:
    """`c_skip x_t + c_out raw`, without multiplications by 0 and 1."""
    if isinstance(c_skip, float):
        if c_skip == 0.0:
            return raw * c_out if c_out != 1.0 else raw.clone()  # the network may reuse its output buffer
        return torch.add(x_t * c_skip, raw, alpha=float(c_out))
    return spread(c_skip, x_t) * x_t + spread(c_out, x_t) * raw


class FixedAttribute(BadInput, AttributeError):
    """An attribute is assigned that cached values depend on."""


class NotForwarded(HastenError, AttributeError):
    """A method of the inner denoiser is requested that would skip what the wrapper's `forward` does."""


class Wrapper(nn.Module):
    """A denoiser around another one. What it does not define (`schedule`, `prediction`, ...) is the inner denoiser's.

    A subclass with state from one evaluation to the next defines `reset()`, which is called before a trajectory. One
    that overrides `forward` and can be steered from outside overrides `features` as well, and `raw` and `moments` where
    they are used: the inner ones would skip what its `forward` does. With a class attribute `takes_rows = True` its
    `forward` gets `rows` (R,) where an evaluation is about some samples of the batch only.

    Args:
        denoiser: the inner one, a `Denoiser`, a wrapper, or any module of the same call signature.
    """

    denoiser: Any

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Any:
        """The inner denoiser's x0 (B, *S); subclasses change it."""
        return self.denoiser(x_t, t, **cond)

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The inner denoiser's `features`, where this wrapper does not override `forward`.

        Raises:
            HastenError: where it does, as the features would skip that.
        """
        if type(self).forward is not Wrapper.forward:
            raise HastenError(
                f"{type(self).__name__} cannot be steered from outside by its middle features: "
                "name the guide that steers them before it"
            )
        middle, finish = self.denoiser.features(x_t, t, **cond)
        return middle, finish

    def __getattr__(self, name: str) -> Any:
        """An attribute of the inner denoiser, except evaluations that would skip an overridden `forward`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in EVALUATION_METHODS and type(self).forward is not Wrapper.forward:
                raise NotForwarded(
                    f"{type(self).__name__} changes its denoiser's output, and does not define {name!r}"
                ) from None
            return getattr(super().__getattr__("denoiser"), name)


def reset(denoiser: Any) -> None:
    """Call `reset` of every module inside whose class defines it: a new trajectory begins."""
    if isinstance(denoiser, nn.Module):
        for module in denoiser.modules():
            method = getattr(module, "reset", None) if hasattr(type(module), "reset") else None
            if callable(method):
                method()
