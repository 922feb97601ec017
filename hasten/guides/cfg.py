"""Classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_numbers
from ..predictions import spread
from ..schedules.base import Schedule
from ._base import Guide

__all__ = ["CFG", "GuidedDenoiser"]


@dataclass(frozen=True)
class CFG(Guide):
    """Classifier-free guidance, `x0 = x0_uncond + scale (x0_cond - x0_uncond)`, both from one batch of 2 B rows.

    `scale = 1` is the plain conditional model (papers' w is scale - 1, Imagen's w is scale). Guiding x0, eps or v is
    the same thing, since they differ by a linear map.

    Args:
        scale: any finite number; 1 costs nothing: `wrap` returns the denoiser itself.
        interval: `(q_lo, q_hi)`: guide only where q_lo < sigma / alpha <= q_hi; elsewhere only the conditional branch
            is evaluated. None guides everywhere.
        rescale: in [0, 1]: the fraction of the standard deviation added by guidance that is removed again, per sample
            and in the network's own output (paper: v, .7 with scale 7.5).

    References:
        Ho, Salimans 2022, arXiv:2207.12598; interval: Kynkaanniemi et al. 2024, arXiv:2404.07724; rescale: Lin et al.
        2023, arXiv:2305.08891.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    infinite: ClassVar[tuple[str, ...]] = ("interval",)
    negative: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise BadInput(f"cfg needs a finite scale, found {self.scale}")
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise BadInput(f"cfg needs interval = (q_lo, q_hi) with 0 <= q_lo < q_hi, found {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise BadInput(f"cfg needs rescale in [0, 1], found {self.rescale}")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The guided denoiser, of the same signature.

        The unconditional branch gets `denoiser.null_label`, where every call has `label=`, or `null_NAME` for every
        condition NAME with such a counterpart.

        Raises:
            BadInput: for a model without a null label, and for a student without this scale.
        """
        if getattr(denoiser, "guidance_range", None) is not None:
            return distilled(denoiser, self)
        if self.scale == 1.0:
            return denoiser
        has_null = getattr(getattr(denoiser, "net", None), "null_conditions", False)
        if getattr(denoiser, "null_label", None) is None and not has_null:
            raise BadInput(
                f"guidance needs a model with a null label (one trained with label dropout), found null_label None in "
                f"{type(denoiser).__name__}"
            )
        return GuidedDenoiser(denoiser, self)


def distilled(denoiser: nn.Module, guide: CFG) -> nn.Module:
    """A distilled student at the guide's scale, one evaluation a step.

    Raises:
        BadInput: for a scale that it was not distilled for, and for an interval or a rescaling.

    References:
        Meng et al. 2023, arXiv:2210.03142.
    """
    scales: Any = denoiser.guidance_range
    low, high = scales
    if guide.interval is not None or guide.rescale:
        raise BadInput("a distilled student has its guidance inside: interval and rescale cannot be applied to it")
    if not low - 1e-6 <= guide.scale <= high + 1e-6:
        span = f"{low:g} to {high:g}" if low < high else f"{low:g} only"
        raise BadInput(f"this student was distilled for guidance_scale {span}, asked for {guide.scale:g}")
    return WithInputs(denoiser, guidance=guide.scale) if low < high else denoiser


def with_step_count(denoiser: nn.Module, steps: int) -> nn.Module:
    """The denoiser with the number of steps as an input, where it is a student that has this input.

    Raises:
        BadInput: for a number of steps that it was not distilled for.
    """
    counts = getattr(denoiser, "step_counts", None)
    if counts is None:
        return denoiser
    if steps not in counts:
        raise BadInput(f"this student was distilled for {', '.join(map(str, counts))} steps, asked for {steps}")
    return WithInputs(denoiser, steps=steps)


class WithInputs(Wrapper):
    """A student whose network gets constant inputs in every evaluation: its guidance scale, its step count.

    Args:
        denoiser: the student.
        inputs: by name, the values.
    """

    def __init__(self, denoiser: nn.Module, **inputs: float) -> None:
        super().__init__(denoiser)
        self.inputs = inputs

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The student's x0 (B, *S)."""
        return self.denoiser(x_t, t, **self._with(x_t), **cond)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The output of the student's network (B, *S)."""
        raw: Tensor = self.denoiser.raw(x_t, t, **self._with(x_t), **cond)
        return raw

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The student's `features`."""
        middle, finish = self.denoiser.features(x_t, t, **self._with(x_t), **cond)
        return middle, finish

    def _with(self, x_t: Tensor) -> dict[str, Tensor]:
        """The inputs of a batch."""
        return {key: torch.full((len(x_t),), value, device=x_t.device) for key, value in self.inputs.items()}


class GuidedDenoiser(Wrapper):
    """A denoiser under `CFG`, of the same signature; `label=` must be given."""

    def __init__(self, denoiser: nn.Module, guide: CFG) -> None:
        super().__init__(denoiser)
        self.guide = guide
        self._last: tuple[dict[str, Any], dict[str, Any]] | None = (
            None  # the last conditions, and those of both branches
        )

    def forward(self, x_t: Tensor, t: Tensor | float, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        """x0 (B, *S) under guidance.

        Args:
            x_t: (B, *S).
            t: () or (B,).
            label: (B,) int64.
            cond: other conditions; those of B rows are doubled with the batch.

        Raises:
            BadInput: without a condition to guide towards.
        """
        return self.with_cond(x_t, t, label=label, **cond)[0]

    def with_cond(
        self, x_t: Tensor, t: Tensor | float, *, label: Tensor | None = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """x0 under guidance and that of the conditional branch alone, each (B, *S)."""
        inside = self._inside(t)
        if inside is False:
            alone = self.denoiser(x_t, t, **self._alone(label, cond))
            return alone, alone
        both = self._both(x_t, label, cond)
        outputs = self.denoiser(torch.cat([x_t, x_t]), _doubled(t, len(x_t)), **both)
        return self._combined(outputs, x_t, t, inside), outputs.chunk(2)[0]

    def branch(
        self,
        x_t: Tensor,
        t: Tensor | float,
        *,
        uncond: bool = False,
        both: bool = False,
        label: Tensor | None = None,
        **cond: Any,
    ) -> Any:
        """x0 (B, *S) of the conditional branch alone; used by plans that say the branch of each evaluation.

        Args:
            x_t: (B, *S).
            t: () or (B,).
            uncond: of the unconditional branch.
            both: the pair (conditional, unconditional), from one batch of 2 B rows.
            label, cond: as in `forward`.

        Raises:
            BadInput: without a condition to guide towards.
        """
        if both:
            outputs = self.denoiser(torch.cat([x_t, x_t]), _doubled(t, len(x_t)), **self._both(x_t, label, cond))
            return outputs.chunk(2)
        return self.denoiser(x_t, t, **(self._null(label, cond) if uncond else self._alone(label, cond)))

    def features(
        self, x_t: Tensor, t: Tensor | float, *, label: Tensor | None = None, **cond: Any
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The conditional branch's middle features. `finish` moves both branches by the same difference, so that a step
        in the features has the same effect whatever the scale.
        """
        inside = self._inside(t)
        if inside is False:
            return self.denoiser.features(x_t, t, **self._alone(label, cond))
        both = self._both(x_t, label, cond)
        x_twice, t_twice = torch.cat([x_t, x_t]), _doubled(t, len(x_t))
        middle, finish = self.denoiser.features(x_twice, t_twice, **both)
        of_cond, of_uncond = middle.chunk(2)

        def finish_both(changed: Tensor) -> Tensor:
            moved = torch.cat([changed, of_uncond + (changed - of_cond)])
            return self._combined(finish(moved), x_t, t, inside)

        return of_cond, finish_both

    def raw(self, x_t: Tensor, t: Tensor | float, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The network's own output under guidance, (B, *S): the same combination, as all prediction types are linear in
        x0.

        Raises:
            BadInput: with an interval or a rescaling.
        """
        if self.guide.rescale or self.guide.interval is not None:
            raise BadInput("the network's own output under guidance is known without interval and rescale only")
        both = self._both(x_t, label, cond)
        raw = self.denoiser.raw(torch.cat([x_t, x_t]), _doubled(t, len(x_t)), **both)
        of_cond, of_uncond = raw.chunk(2)
        return of_uncond + self.guide.scale * (of_cond - of_uncond)

    def _conditions(self, label: Tensor | None, cond: dict[str, Any]) -> dict[str, Any]:
        """All conditions. Raises BadInput where there is nothing to guide towards."""
        if label is None and not any(key.startswith("null_") for key in cond):
            raise BadInput(f"guidance with scale {self.guide.scale:g} needs label=, the classes to guide towards")
        return cond if label is None else {**cond, "label": label}

    def _alone(self, label: Tensor | None, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions of the conditional branch."""
        return {key: value for key, value in self._conditions(label, cond).items() if not key.startswith("null_")}

    def _null(self, label: Tensor | None, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions of the unconditional branch."""
        null = {}
        for key, value in self._alone(label, cond).items():
            if f"null_{key}" in cond:
                null[key] = cond[f"null_{key}"]
            elif key == "label" and self.denoiser.null_label is not None:
                null[key] = torch.full_like(value, self.denoiser.null_label)
            else:
                null[key] = value
        return null

    def _both(self, x_t: Tensor, label: Tensor | None, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions of the 2 B rows: conditional, and without a class or with the null counterpart of each
        condition."""
        states: dict[str, Any] = {key: _state(value) for key, value in self._conditions(label, cond).items()}
        if self._last is not None and self._last[0] == {**states, "": len(x_t)}:
            return dict(self._last[1])  # the same tensors as before, which accelerators recognise without comparing
        both, null = {}, self._null(label, cond)
        for key, value in self._alone(label, cond).items():
            both[key] = _doubled(value, len(x_t)) if null[key] is value else torch.cat([value, null[key]])
        comparable = all(state is not None for state in states.values())
        self._last = ({**states, "": len(x_t)}, both) if comparable else None
        return dict(both)

    def _combined(self, outputs: Tensor, x_t: Tensor, t: Tensor | float, inside: bool | Tensor) -> Tensor:
        """x0 under guidance from the outputs (2 B, *S) of both branches."""
        x0_cond, x0_uncond = outputs.chunk(2)
        guided = self._mixed(x0_cond, x0_uncond, x_t, t)
        if self.guide.rescale:
            guided = self._rescaled(guided, x0_cond, x_t, t)
        return guided if inside is True else torch.where(spread(inside, x_t).bool(), guided, x0_cond)

    def _mixed(self, x0_cond: Tensor, x0_uncond: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x0 under guidance from both branches."""
        return x0_uncond + self.guide.scale * (x0_cond - x0_uncond)

    def _inside(self, t: Tensor | float) -> bool | Tensor:
        """Whether the time is in the interval: a bool for one time, (B,) bools for several of which some are."""
        if self.guide.interval is None:
            return True
        low, high = self.guide.interval
        schedule: Schedule = self.denoiser.schedule
        q = schedule.q(t)
        inside = (q > low) & (q <= high)
        return inside if inside.ndim and bool(inside.any()) else bool(inside.any())

    def _rescaled(self, x0: Tensor, x0_cond: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """phi o std(o_cond) / std(o) + (1 - phi) o, for o the network's own output, or x0 of a denoiser without one."""
        skip, scale = torch.zeros(()), torch.ones(())
        prediction, schedule = getattr(self.denoiser, "prediction", None), self.denoiser.schedule
        if prediction is not None:
            _, skip, scale = prediction.coefficients(schedule.alpha(t), schedule.sigma(t))
            if bool((scale == 0).any()):
                return x0  # at sigma = 0 the output does not matter
        skipped = spread(skip, x_t) * x_t
        output, output_cond = ((value - skipped) / spread(scale, x_t) for value in (x0, x0_cond))
        dims = tuple(range(1, x_t.ndim))
        n = output[0].numel()  # one number has no deviation
        std, target = (o.std(dims, correction=min(1, n - 1), keepdim=True) for o in (output, output_cond))
        ratio = torch.where(std > 0, target / std, 1.0)  # a constant output has no contrast
        phi = self.guide.rescale
        return skipped + spread(scale, x_t) * (phi * ratio * output + (1 - phi) * output)


class Remixed(GuidedDenoiser):
    """Base of denoisers that combine both branches in another way: they define `_mixed`.

    Args:
        guided: the denoiser under `CFG` whose scale, interval and rescaling they use.
    """

    branch: Any = None  # plans over both branches are made for plain guidance

    def __init__(self, guided: GuidedDenoiser) -> None:
        super().__init__(guided.denoiser, guided.guide)

    def raw(self, x_t: Tensor, t: Tensor | float, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        """Raises BadInput: the combination is one of x0."""
        raise BadInput("the network's own output under guidance is known for plain guidance only")


class _State:
    """A tensor and its version: equal as long as it is not modified in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and self.tensor is other.tensor and self.version == other.version


def _state(value: Any) -> Any:
    """A value that is equal as long as a condition is unchanged; None where that cannot be determined."""
    if not isinstance(value, Tensor):
        return value
    return None if value.is_inference() or value.requires_grad else _State(value)


def _doubled(value: Any, B: int) -> Any:
    """A batched condition twice, others as they are."""
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and len(value) == B else value
