"""Tracing costs little, happens once, and its tables are as good as the coroutine under every autograd mode."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import BadInput
from hasten.exact import m2, m64
from hasten.plan import Plan, plan
from hasten.plan.basis import Basis
from hasten.plan.draw import compile_plan, draw
from hasten.samplers import DDIM, DDPM, DEIS, FastDPM, Heun, Preconditioned, PredictorCorrector, UniPC
from hasten.sampling import Noise, walk
from hasten.schedules import EDM, Discrete, Flow, VPCosine, VPLinear
from hasten.times import UniformLambda, UniformTime
from tests.samplers.problems import CASES, LINEAR, label

F64 = torch.float64
DIFFERENTIABLE = [
    *LINEAR,
    FastDPM(kappa=1.0),
    FastDPM(approximation="step"),
    FastDPM(schedule="linear", kappa=0.5),
    PredictorCorrector("euler_maruyama", 0),
    PredictorCorrector("ancestral", 0),
    PredictorCorrector("reverse_diffusion", 0),
]


def test_a_thousand_steps_are_traced_in_a_second() -> None:
    """At commit 34613da 1000 steps took 1.6 to 3 s on a free core; CPU seconds, the best of three."""
    times = UniformTime()(Discrete.linear(), 1000)
    best = np.inf
    for _ in range(3):
        begin = time.process_time()
        made = plan(DDPM(), Discrete.linear(), times)
        best = min(best, time.process_time() - begin)
    assert made.nfe == 1000 and best < 1.0


def test_the_work_of_tracing_grows_no_faster_than_what_it_writes() -> None:
    """Rows of a method without memory are read off as they were written, not searched for."""
    import hasten.plan.tracing as tracing

    calls = 0
    original = tracing._drop_rounding

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args)

    tracing._drop_rounding = counted  # type: ignore[assignment]
    try:
        plan(DDPM(), VPLinear(), UniformTime()(VPLinear(), 40))
    finally:
        tracing._drop_rounding = original
    assert calls <= 40 + 1


def test_a_model_traces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hasten sample` resolves its setting twice and samples in batches."""
    model, traces = hasten.load("fashion"), []
    import sys

    module = sys.modules["hasten.plan.table"]
    original = module.trace
    monkeypatch.setattr(module, "trace", lambda *a: traces.append(1) or original(*a))
    model.setting("ddim", "trailing", 3, 1.0)
    model.sample(3, sampler="ddim", times="trailing", steps=3, guidance_scale=1.0, batch_size=2)
    assert len(traces) == 1


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(offset=0.0), Flow(), EDM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler", DIFFERENTIABLE, ids=label)
def test_gradients_in_the_times(sampler: Any, schedule: Any) -> None:
    """Every number of the table against difference quotients, or a refusal; with both ends of the schedule."""
    inner = torch.tensor([0.83, 0.61, 0.43, 0.22, 0.05], dtype=F64)

    def numbers(inner: Tensor) -> Tensor:
        p = plan(sampler, schedule, torch.cat([inner.new_ones(1) * schedule.t_max, inner, inner.new_zeros(1)]))
        return torch.cat([p.start, p.a, p.A.flatten(), p.B.flatten(), p.C.flatten(), p.times])

    free = inner.clone().requires_grad_()
    found = numbers(free)
    weights = torch.linspace(0.5, 1.5, len(found), dtype=F64)
    (gradient,) = torch.autograd.grad((found * weights).sum(), free)
    for k, e in enumerate(torch.eye(5, dtype=F64)):
        quotient = ((numbers(inner + 1e-6 * e) - numbers(inner - 1e-6 * e)) * weights).sum() / 2e-6
        assert float(gradient[k]) == pytest.approx(float(quotient), rel=1e-3, abs=1e-3), k


@pytest.mark.parametrize("sampler", [s for s in CASES if not getattr(s, "differentiable", True)], ids=label)
def test_gradients_that_cannot_be_kept_are_refused(sampler: Any) -> None:
    x = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    with pytest.raises(BadInput, match="keeps no gradients"):
        walk(sampler, m2(VPLinear()), x, UniformLambda()(VPLinear(), 3), Noise([0, 1], (2,), F64))
    walk(sampler, m2(VPLinear()), x.detach(), UniformLambda()(VPLinear(), 3), Noise([0, 1], (2,), F64))


def after_inference_mode(first: Any, then: Any) -> None:
    with torch.inference_mode():
        first()
    then()


def test_caches_filled_in_inference_mode_serve_autograd() -> None:
    times = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1], dtype=F64)

    def free() -> Tensor:
        return times.clone().requires_grad_()

    import hasten.samplers.deis as deis

    deis._gauss.cache_clear()
    after_inference_mode(
        lambda: plan(DEIS(3), VPLinear(), times), lambda: plan(DEIS(3), VPLinear(), free()).B.sum().backward()
    )
    for convention in ("log_alpha", "log_q"):
        table = Discrete.linear(convention=convention)
        after_inference_mode(
            lambda: (table.alpha(0.5), table.time(table.lam(0.3))),
            lambda: (table.alpha(free()).sum() + table.time(table.lam(free())).sum()).backward(),
        )


@pytest.mark.parametrize("sampler", [UniPC(3), "preconditioned"], ids=str)
def test_a_sampling_in_inference_mode_leaves_nothing_that_autograd_cannot_use(sampler: Any) -> None:
    S = (1, 8, 8)
    exact = m64(VPLinear())

    class Shaped(torch.nn.Module):
        schedule = VPLinear()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return exact(x.flatten(1), t).reshape(x.shape)

    if sampler == "preconditioned":
        with torch.inference_mode():
            variance = torch.linspace(0.1, 1.0, 64).reshape(S)
            sampler = Preconditioned(basis=Basis(torch.zeros(S), variance, "dct").grouped(8))
    noise = Noise([0, 1], S)

    def with_gradient() -> None:
        x = noise.initial().requires_grad_()
        draw(Shaped(), sampler, UniformLambda(), noise, steps=5, x=x).sum().backward()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all())

    after_inference_mode(lambda: draw(Shaped(), sampler, UniformLambda(), noise, steps=5), with_gradient)
    with torch.inference_mode():  # a plan made there is an ordinary one
        made = plan(Heun(), VPLinear(), UniformTime()(VPLinear(), 4))
    assert not made.times.is_inference() and not made.B.is_inference()


def test_a_parameter_of_a_sampler_gets_its_gradient() -> None:
    """Though tracing runs on arrays, and though plans are kept."""
    eta = torch.tensor(0.5, dtype=F64, requires_grad=True)

    class Scaled(DDIM):
        def steps(self, schedule: Any, x: Any, times: Any, noise: Any) -> Any:
            return (eta * (yield from super().steps(schedule, x, times, noise))) * np.float64(2.0)

    for _ in range(2):
        made = compile_plan(Scaled(), VPLinear(), UniformTime()(VPLinear(), 3))
        assert made.B.requires_grad
        (gradient,) = torch.autograd.grad(made.B.sum(), eta)
        assert float(gradient) == pytest.approx(2 * float(plan(DDIM(), VPLinear(), made.times).B[-1].sum()))


def test_old_states_are_let_go() -> None:
    """A one-step method holds the state it is at and the one before, however long the plan is."""
    import weakref

    made: Plan = plan(DDPM(), VPLinear(), UniformTime()(VPLinear(), 12))
    alive: list[int] = []
    seen: list[weakref.ref] = []

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(weakref.ref(x_t))
        alive.append(sum(ref() is not None for ref in seen))
        return x_t * 0.5

    made(denoiser, torch.randn(1, 4), Noise([0], (4,)))
    assert max(alive) <= 2
