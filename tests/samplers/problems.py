"""What the sampler tests share: the samplers of the folder, schedules, exact problems, ways to drive a coroutine."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hasten.samplers
from hasten.exact import GaussianMixture, m2, m64
from hasten.samplers import DDIM, DDPM, DEIS, PLMS, DPMSolver, Heun, UniPC
from hasten.schedules import EDM, VE, Discrete, Flow, Schedule, SubVP, VPCosine, VPLinear, rescale_zero_snr

F64 = torch.float64
FOUR = {"VPLinear": VPLinear(), "VPCosine": VPCosine(), "EDM": EDM(), "Flow": Flow()}
ALL = {
    **FOUR,
    "VPCosine0": VPCosine(offset=0.0),
    "Flow3": Flow(shift=3.0),
    "SubVP": SubVP(),
    "VE": VE(),
    "Discrete": Discrete.linear(),
    "DiscreteCosine": Discrete.cosine(convention="log_q"),
    "ZeroSNR": rescale_zero_snr(Discrete.scaled_linear()),
}

# one of each kind of end: variance preserving, alpha = 1, pure noise of a formula, pure noise of a table
ENDS = {name: ALL[name] for name in ("VPLinear", "EDM", "Flow", "ZeroSNR")}

# alpha = 1, so y = z, and any level at hand: for the reference solutions
VE_WIDE = VE(sigma_min=1e-4, sigma_max=1e5)


def discovered() -> dict[str, list[type]]:
    """File name -> the public sampler dataclasses that the file defines."""
    found = {}
    for info in pkgutil.iter_modules(hasten.samplers.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"hasten.samplers.{info.name}")
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        found[info.name] = [c for c in classes if is_dataclass(c) and (hasattr(c, "steps") or hasattr(c, "solve"))]
    return found


# Options beyond the defaults; a new sampler is tested with its defaults without being named here.
VARIANTS: list[Any] = [
    DDPM("large"),
    DDIM(eta=1.0),
    DDIM(eta=0.5),
    Heun(churn=8.0, churn_min=0.1, churn_max=20.0, churn_noise=1.0),
    DPMSolver(1),
    DPMSolver(3),
    DPMSolver(2, predict="eps"),
    DPMSolver(3, predict="eps"),
    DPMSolver(2, variant="taylor"),
    DPMSolver(3, third="compat"),
    DPMSolver(2, multistep=False),
    DPMSolver(3, multistep=False),
    DPMSolver(3, multistep=False, predict="eps", variant="taylor"),
    *[DPMSolver(order, sde=True) for order in (1, 2, 3)],
    DPMSolver(2, sde=True, predict="eps", variant="taylor"),
    UniPC(1, corrector=False),
    UniPC(1),
    UniPC(3, corrector=False),
    UniPC(3),
    UniPC(4),
    UniPC(2, "bh1"),
    UniPC(3, predict="eps"),
    DEIS(2),
    DEIS(4),
    DEIS(3, "rho"),
    DEIS(4, "log_rho"),
    PLMS(2),
    PLMS(start="ramp"),
]
# What must be bound to a model first (`needs`) has tests of its own, and so have samplers of other processes; so has,
# beyond the calls, what looks at values.
CASES: list[Any] = list(
    dict.fromkeys(
        [
            *(
                c()
                for found in discovered().values()
                for c in found
                if not getattr(c, "needs", "") and not getattr(c, "processes", ())
            ),
            *VARIANTS,
        ]
    )
)
LINEAR: list[Any] = [sampler for sampler in CASES if sampler.linear]


def label(value: Any) -> str:
    """A short test id: only the fields that are not at their default."""
    if isinstance(value, type):
        return value.__name__
    default = type(value)()
    changed = [f"{k}={v}" for k, v in vars(value).items() if getattr(default, k) != v]
    return f"{type(value).__name__}({','.join(changed)})"


def declared(sampler: Any) -> int:
    """The order of convergence a sampler claims: `convergence`, where it differs from its `order`."""
    return getattr(sampler, "convergence", sampler.order)


def unlowered(sampler: Any) -> Any:
    """The sampler without its drop to order 1 over the last steps, which caps the order at 2."""
    return replace(sampler, lower_order_final=False) if hasattr(sampler, "lower_order_final") else sampler


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def drive(
    sampler: Any,
    schedule: Schedule,
    denoise: Callable[[Any, Tensor], Any],
    x: Any,
    times: Tensor,
    noise: Callable[[], Any] = no_noise,
) -> tuple[Any, list[Tensor]]:
    """Run the coroutine itself; the result and the times it asked for. Independent of the library's own loops."""
    coroutine = sampler.steps(schedule, x, times, noise)
    asked = []
    try:
        query = next(coroutine)
        while True:
            asked.append(query.t)
            query = coroutine.send(denoise(query.x, query.t))
    except StopIteration as stop:
        return stop.value, asked


class Basis:
    """Vectors for runs that are linear in start and noise: slot 0 is the start, each draw is a fresh slot."""

    def __init__(self, size: int = 1500):
        self.size, self.used = size, 0

    def __call__(self) -> Tensor:
        e = torch.zeros(self.size, dtype=F64)
        e[self.used] = 1.0
        self.used += 1
        return e


def is_stochastic(sampler: Any) -> bool:
    drawn = []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.zeros((), dtype=F64)

    drive(sampler, VPLinear(), lambda z, t: 0 * z, torch.ones((), dtype=F64), ends(VPLinear(), 8), noise)
    return bool(drawn)


def ends(schedule: Schedule, steps: int) -> Tensor:
    """Uniform in time from the schedule's own noisy end to 0."""
    return torch.linspace(schedule.t_max, 0, steps + 1, dtype=F64)


def between(schedule: Schedule, q0: float, q1: float, steps: int, warm: int = 0) -> Tensor:
    """`steps` times equal in lam from q0 to q1. warm > 0 cuts the first of them into h/2^warm, h/2^warm, h/2^(warm-1),
    ..., h/2, so that a multistep method has starting values far more exact than its own error (its first step is of
    order 1)."""
    w = torch.linspace(0, 1, steps + 1, dtype=F64)
    if warm:
        w = torch.cat([w[:1], w[1] * 2.0 ** torch.arange(-warm, 0, dtype=F64), w[1:]])
    return schedule.time(-math.log(q0) + w * math.log(q0 / q1))


MIXTURES = {"M2": m2, "M64": m64}


def normals(rows: int, d: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((rows, d)))


@cache
def mixture_ode(name: str, rows: int, q0: float, q1: float) -> tuple[Tensor, Tensor]:
    """(y at q0, y at q1) along the probability-flow equation, y = z/alpha, by the reference integrator to 1e-10."""
    model = MIXTURES[name](VE_WIDE)
    start = normals(rows, model.means.shape[1]) * math.sqrt(1 + q0**2)
    t0, t1 = (0.0 if q == 0 else VE_WIDE.time(-math.log(q)) for q in (q0, q1))
    return start, model.ode(start, t0, t1)


def mixture(name: str, schedule: Schedule) -> GaussianMixture:
    return MIXTURES[name](schedule)


def rms(a: Tensor, b: Tensor) -> float:
    return (a - b).pow(2).mean().sqrt().item()
