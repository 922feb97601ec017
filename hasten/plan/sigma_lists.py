"""The times of a plan as sigma lists, the form in which other programs take them.

A list of sigmas says when a network is evaluated, and no more: the program that reads it runs a sampler of its own on
it. Of Euler's method (DDIM) nothing is lost; what of another plan stays behind is said in `SigmaLists.warnings`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..schedules.base import Schedule
from ..schedules.continuous import Flow
from ..schedules.discrete import Discrete
from ..schedules.serialize import schedule_from_dict
from .table import Plan

__all__ = ["SigmaLists", "sigma_lists"]

# Samplers of diffusers, ComfyUI and stable-diffusion.cpp that are nearest to one of hasten, by its name.
NEAREST = {
    "ddim": ("EulerDiscreteScheduler", "euler", "euler"),
    "heun": ("HeunDiscreteScheduler", "heun", "heun"),
    "dpm": ("DPMSolverMultistepScheduler", "dpmpp_2m", "dpm++2m"),
    "unipc": ("UniPCMultistepScheduler", "uni_pc", "dpm++2m"),
    "deis": ("DEISMultistepScheduler", "deis", "ipndm"),
    "plms": ("PNDMScheduler", "ipndm", "ipndm"),
    "consistency": ("LCMScheduler", "lcm", "lcm"),
}


@dataclass(frozen=True)
class SigmaLists:
    """The distinct times of a plan in the conventions of other programs.

    Attributes:
        sigmas: noise levels that a network sees, decreasing, with the end: of a flow sigma, with its shift; else
            sigma / alpha. ComfyUI's ManualSigmas node and the option --sigmas of stable-diffusion.cpp take these.
        diffusers: what a pipeline of diffusers takes as `sigmas=`: of a flow before the shift and without the end,
            both of which its scheduler adds; else the same as `sigmas`.
        timesteps: what other schedulers of diffusers take as `timesteps=`; None where the schedule is no table.
        flow: whether the schedule is a flow.
        shift: of the flow.
        sampler: the text of the plan's sampler.
        warnings: what the lists do not say.
    """

    sigmas: tuple[float, ...]
    diffusers: tuple[float, ...]
    timesteps: tuple[int, ...] | None
    flow: bool
    shift: float
    sampler: str
    warnings: tuple[str, ...]

    @property
    def manual_sigmas(self) -> str:
        """The text for ComfyUI's ManualSigmas node, which reads no exponents."""
        return ", ".join(map(decimal, self.sigmas))

    @property
    def sd_cpp(self) -> str:
        """The value of --sigmas of stable-diffusion.cpp."""
        return ",".join(map(decimal, self.sigmas))

    def to_dict(self) -> dict[str, Any]:
        """All lists, for JSON."""
        return {
            "sampler": self.sampler,
            "diffusers": {
                "sigmas": [*self.diffusers],
                "timesteps": None if self.timesteps is None else [*self.timesteps],
            },
            "comfyui": self.manual_sigmas,
            "stable-diffusion.cpp": self.sd_cpp,
            "sigmas": [*self.sigmas],
            "warnings": [*self.warnings],
        }

    def text(self) -> str:
        """All lists, a line each with a line before it that says where it goes."""
        kind = f"sigma of a flow, shift {self.shift:g}" if self.flow else "sigma / alpha"
        lines = [f"{len(self.sigmas) - 1} steps of {self.sampler or 'a plan'} ({kind})", ""]
        names = NEAREST.get(self.sampler.partition(":")[0], NEAREST["ddim"])
        euler = "FlowMatchEulerDiscreteScheduler" if self.flow else NEAREST["ddim"][0]
        where = f"before the shift, which the scheduler applies ({euler})" if self.flow else euler
        lines += [f"diffusers, {where}:", f"sigmas=[{', '.join(map(decimal, self.diffusers))}]", ""]
        if self.timesteps is not None:
            lines += ["diffusers, schedulers that take timesteps:", f"timesteps={list(self.timesteps)}", ""]
        lines += [f"ComfyUI, node ManualSigmas (sampler {names[1]}):", self.manual_sigmas, ""]
        lines += ["stable-diffusion.cpp:", f"--sampling-method {names[2]} --sigmas {self.sd_cpp}"]
        return "\n".join(lines)


def sigma_lists(plan: Plan, schedule: Schedule | None = None) -> SigmaLists:
    """The times of a plan as sigma lists.

    Args:
        plan: of any sampler.
        schedule: of the network. Default: the plan's own.

    Raises:
        BadInput: for a plan without a schedule, and where a time is pure noise, whose sigma / alpha is infinite.
    """
    if schedule is None:
        if not plan.schedule:
            raise BadInput("the plan does not say its schedule, from which sigmas are computed: name its model")
        schedule = schedule_from_dict(plan.schedule)
    times = torch.unique(plan.times.detach()).flip(0)
    flow = isinstance(schedule, Flow)
    levels = schedule.sigma(times) if flow else schedule.q(times)
    if not bool(torch.isfinite(levels).all()):
        raise BadInput(
            f"the first time, t = {float(times[0]):g}, is pure noise, whose sigma is infinite: begin below it, such as "
            "--times trailing:start=0.999"
        )
    shift = schedule.shift if isinstance(schedule, Flow) else 1.0
    inner = times if float(times[-1]) > 0 else times[:-1]
    return SigmaLists(
        sigmas=tuple(levels.tolist()),
        diffusers=tuple(inner.tolist()) if flow else tuple(levels.tolist()),
        timesteps=tuple(schedule.index(inner).round().int().tolist()) if isinstance(schedule, Discrete) else None,
        flow=flow,
        shift=shift,
        sampler=plan.sampler,
        warnings=tuple(left_behind(plan, schedule, times)),
    )


def left_behind(plan: Plan, schedule: Schedule, times: Tensor) -> list[str]:
    """What a list of the plan's times does not say, a line each."""
    lines = []
    if plan.stochastic:
        lines.append("the noise that the plan adds between its evaluations stays behind: choose a sampler that adds it")
    elif not is_euler(plan, schedule):
        nearest = NEAREST.get(plan.sampler.partition(":")[0])
        hint = "" if nearest is None else f" (nearest: {', '.join(nearest[:2])}; {nearest[2]} in stable-diffusion.cpp)"
        lines.append(
            f"the coefficients of {plan.sampler or 'the plan'} stay behind: sigmas are its times only, and the program "
            f"runs its own sampler on them{hint}; hasten.as_scheduler runs the plan itself in diffusers"
        )
    if len(times) != plan.nfe + 1:
        lines.append(f"the plan evaluates the network {plan.nfe} times at {len(times) - 1} sigmas")
    if float(times[-1]) > 0:
        lines.append("the plan does not end at the clean image: nor does the list, whose last sigma is not 0")
    return lines


def is_euler(plan: Plan, schedule: Schedule) -> bool:
    """Whether every row of a plan is the step of Euler's method in x / sigma, which is DDIM."""
    if plan.basis is not None or bool(plan.A.any()) or bool((plan.B - torch.diag(plan.B.diagonal())).any()):
        return False
    alpha, sigma = schedule.alpha(plan.times), schedule.sigma(plan.times)
    ratio = sigma[1:] / sigma[:-1]
    x0 = alpha[1:] - ratio * alpha[:-1]
    starts = torch.eye(len(plan.start), dtype=torch.float64)[0]
    pairs = ((plan.a, ratio), (plan.B.diagonal(), x0), (plan.start, starts))
    return all(torch.allclose(ours, euler, rtol=0, atol=1e-6) for ours, euler in pairs)


def decimal(value: float) -> str:
    """A number of at least 0 with six significant digits and no exponent."""
    digits = 5 if value <= 0 else max(0, 5 - math.floor(math.log10(value)))
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"
