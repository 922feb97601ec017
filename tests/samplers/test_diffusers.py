"""The same network, start, times and table as diffusers 0.42: equal samples where diffusers is right, and the truth
where it is not.

The network is an eps-prediction with the exact answer for the mixture M2, told the integer timestep; images are
float32.
diffusers keeps its table in float32, so our schedule is made of that table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.plan import plan
from hasten.samplers import DDIM, DDPM, DEIS, DPMSolver, Heun, UniPC
from hasten.samplers._exponential import Known, advance, make_node
from hasten.schedules import Discrete
from tests.samplers.problems import F64, mixture, mixture_ode, normals, rms

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


class Network(nn.Module):
    """eps(x, index): exact for M2 under `schedule`, computed in float64, answered in the dtype of x."""

    def __init__(self, schedule: Discrete):
        super().__init__()
        self.schedule, self.mixture = schedule, mixture("M2", schedule)

    def forward(self, x: Tensor, index: Tensor | float) -> Tensor:
        t = (torch.as_tensor(index, dtype=F64) + 1) / len(self.schedule.alphas_cumprod)
        t = t.flatten()[0]
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return ((x.double() - alpha * self.mixture(x.double(), t)) / sigma).to(x.dtype)


def theirs(scheduler: Any, network: nn.Module, x: Tensor) -> Tensor:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


def table(scheduler: Any) -> Discrete:
    return Discrete(tuple(scheduler.alphas_cumprod.double().tolist()))


def compare(scheduler: Any, sampler: Any, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(theirs, ours, ours in float64), each (64, 2), on diffusers' own integer timesteps and then sigma = 0."""
    scheduler.set_timesteps(steps)
    schedule = table(scheduler)
    network = Network(schedule)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    compiled = plan(sampler, schedule, times)
    denoiser = Denoiser(network, schedule, "eps", clock="index")
    x = normals(64, 2).float()
    return (
        theirs(scheduler, network, x),
        compiled(denoiser, x, None),
        compiled(mixture("M2", schedule), x.double(), None),
    )


def close(one: Tensor, two: Tensor) -> None:
    assert two.dtype == torch.float32
    assert rms(one, two) < 1e-4 * two.pow(2).mean().sqrt().item()


@pytest.mark.parametrize("steps", [5, 10, 14])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(order: int, spacing: str, steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(**LINEAR, solver_order=order, solver_type="bh2", timestep_spacing=spacing)
    close(*compare(scheduler, UniPC(order), steps)[:2])


@pytest.mark.parametrize("steps", [5, 10, 14])
@pytest.mark.parametrize(
    ("order", "algorithm", "solver", "sampler"),
    [
        (1, "dpmsolver++", "midpoint", DPMSolver(1)),
        (2, "dpmsolver++", "midpoint", DPMSolver(2)),
        (2, "dpmsolver++", "heun", DPMSolver(2, variant="taylor")),
        (3, "dpmsolver++", "midpoint", DPMSolver(3, third="compat")),
        (2, "dpmsolver", "midpoint", DPMSolver(2, predict="eps")),
        (3, "dpmsolver", "midpoint", DPMSolver(3, predict="eps", third="compat")),
    ],
    ids=lambda v: str(v) if isinstance(v, (int, str)) else "",
)
def test_dpm_solver(order: int, algorithm: str, solver: str, sampler: Any, steps: int) -> None:
    """Their third order is `third="compat"` (half the second-difference term); the noise prediction, which cannot end
    at sigma = 0 there, ends at the table's first entry, and we with it."""
    from diffusers import DPMSolverMultistepScheduler

    zero = algorithm == "dpmsolver++"
    scheduler = DPMSolverMultistepScheduler(
        **LINEAR,
        solver_order=order,
        algorithm_type=algorithm,
        solver_type=solver,
        final_sigmas_type="zero" if zero else "sigma_min",
    )
    if zero:
        close(*compare(scheduler, sampler, steps)[:2])
        return
    scheduler.set_timesteps(steps)
    schedule = table(scheduler)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.full((1,), 1e-3, dtype=F64)])
    x = normals(64, 2).float()
    ours = plan(sampler, schedule, times)(Denoiser(Network(schedule), schedule, "eps", clock="index"), x, None)
    close(theirs(scheduler, Network(schedule), x), ours)


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_ddim(steps: int) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**LINEAR, timestep_spacing="trailing", clip_sample=False)
    close(*compare(scheduler, DDIM(), steps)[:2])


def test_ddpm_posterior() -> None:
    """One ancestral step with the same noise, both variances."""
    from diffusers import DDPMScheduler

    for variance in ("small", "large"):
        scheduler = DDPMScheduler(
            **LINEAR, variance_type=f"fixed_{variance}", timestep_spacing="trailing", clip_sample=False
        )
        scheduler.set_timesteps(10)
        schedule = table(scheduler)
        x, network = normals(64, 2).float(), Network(schedule)
        t = scheduler.timesteps[3]
        step = scheduler.step(network(x, t), t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        xi = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        times = (scheduler.timesteps[3:5].double() + 1) / 1000
        ours = plan(DDPM(variance), schedule, times)(Denoiser(network, schedule, "eps", clock="index"), x, xi.clone)
        close(step, ours)


def test_deis_in_log_rho() -> None:
    """diffusers' DEIS interpolates in log q and ends at the table's first entry."""
    from diffusers import DEISMultistepScheduler

    for order in (2, 3):
        scheduler = DEISMultistepScheduler(**LINEAR, solver_order=order)
        scheduler.set_timesteps(10)
        schedule = table(scheduler)
        times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.full((1,), 1e-3, dtype=F64)])
        x = normals(64, 2).float()
        ours = plan(DEIS(order, "log_rho"), schedule, times)(
            Denoiser(Network(schedule), schedule, "eps", clock="index"), x, None
        )
        close(theirs(scheduler, Network(schedule), x), ours)


# ---- where diffusers is not right ---------------------------------------------------------------------------------


def test_bh1_that_ends_at_zero_is_not_a_number_there() -> None:
    """With its default final sigma 0, diffusers' bh1 multiplies -inf by 0. Ours ends near the truth."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(**LINEAR, solver_order=2, solver_type="bh1", timestep_spacing="linspace")
    them, ours, _ = compare(scheduler, UniPC(2, "bh1"), 10)
    assert torch.isnan(them).any()
    assert rms(ours.double(), truth(scheduler)) < 0.3


def test_order_is_lowered_at_the_end_however_many_steps() -> None:
    """When the end is not sigma = 0, diffusers lowers the last orders only below 15 steps: more steps, more error."""
    from diffusers import DPMSolverMultistepScheduler

    errors = {}
    for steps in (10, 15):
        scheduler = DPMSolverMultistepScheduler(**LINEAR, solver_order=2, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(steps)
        schedule = table(scheduler)
        times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.full((1,), 1e-3, dtype=F64)])
        x = normals(64, 2)
        ours = plan(DPMSolver(2), schedule, times)(mixture("M2", schedule), x, None)
        exact = truth(scheduler, end=float(schedule.q(1e-3)))
        errors[steps] = rms(theirs(scheduler, Network(schedule), x.float()).double(), exact), rms(ours, exact)
    assert errors[15][0] > 1.5 * errors[10][0] and errors[15][1] < errors[10][1]
    assert errors[10][0] == pytest.approx(errors[10][1], rel=1e-3)


def test_third_order_is_third_order() -> None:
    """diffusers' 3M is of order 2: at 60 steps ours with the whole term is several times nearer."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**LINEAR, solver_order=3, use_exponential_sigmas=True)
    schedule, coarse, fine = Discrete.linear(convention="log_q"), {}, {}
    q0, q1 = 20.0, 0.2
    start, exact = mixture_ode("M2", 64, q0, q1)
    for steps, out in ((60, coarse), (120, fine)):
        lam = -torch.linspace(
            torch.tensor(q0, dtype=F64).log().item(), torch.tensor(q1, dtype=F64).log().item(), steps + 1, dtype=F64
        )
        times = schedule.time(lam)
        for third in ("compat", "true"):
            table_ = plan(DPMSolver(3, third=third, lower_order_final=False), schedule, times)
            z = table_(mixture("M2", schedule), start * schedule.alpha(times[0]), None)
            out[third] = rms(z / schedule.alpha(times[-1]), exact)
    assert scheduler.config.solver_order == 3
    assert fine["compat"] / fine["true"] > 2 and coarse["true"] / fine["true"] > 5 > coarse["compat"] / fine["compat"]


def test_ddim_visits_the_levels_it_says() -> None:
    """With `linspace` diffusers steps to t - 1000/steps, which is not the next timestep. With a network that knows the
    image, the state must be alpha x + sigma eps at every timestep: ours is, theirs is not."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**LINEAR, timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(10)
    schedule = table(scheduler)
    x, eps = torch.full((1, 2), 0.5, dtype=F64), normals(1, 2)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    expected = alpha[:, None, None] * x + sigma[:, None, None] * eps
    state, worst = expected[0], 0.0
    for k, t in enumerate(scheduler.timesteps[:-1]):
        state = scheduler.step((state - alpha[k] * x) / sigma[k], t, state).prev_sample
        worst = max(worst, rms(state, expected[k + 1]))
    assert worst > 0.01
    seen = []
    plan(DDIM(), schedule, times)(Recorder(seen, x), expected[0], None)
    torch.testing.assert_close(torch.stack(seen), expected[:-1], rtol=0, atol=1e-12)


def test_third_order_sde_has_the_right_sign() -> None:
    """diffusers' third-order stochastic step puts -1/2 for +1/2 in the second-difference weight, -1 for 0 as h -> 0."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**LINEAR, solver_order=3, algorithm_type="sde-dpmsolver++")
    schedule = table(scheduler)
    index = torch.tensor([620, 600, 580, 560])
    lam = schedule.lam((index.double() + 1) / 1000)
    # answers quadratic in lam: the drift of the step is an integral, here by Simpson on 200 intervals
    curve = ((lam - lam[2]) / (lam[3] - lam[2])) ** 2
    grid = torch.linspace(0, 1, 201, dtype=F64)
    h = lam[3] - lam[2]
    end = make_node(schedule, (index[3].double() + 1) / 1000)
    kernel = 2 * h * end.alpha * torch.exp(2 * h * (grid - 1)) * grid**2
    exact = (kernel[0] + kernel[-1] + 4 * kernel[1:-1:2].sum() + 2 * kernel[2:-1:2].sum()) / 600
    zero = torch.zeros((), dtype=F64)
    known = [Known(make_node(schedule, (index[k].double() + 1) / 1000), zero, curve[k]) for k in (2, 1, 0)]
    ours = advance(zero, known, end, sde=True, noise=zero)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-8)
    scheduler.set_timesteps(timesteps=index.tolist())
    scheduler._step_index = 2
    them = scheduler.multistep_dpm_solver_third_order_update(
        [curve[k].float().reshape(1) for k in range(3)], sample=torch.zeros(1), noise=torch.zeros(1)
    )
    assert abs(them.item() - exact.item()) > 0.5 * abs(exact.item())


def test_heun_takes_the_same_steps() -> None:
    """diffusers' Heun (Karras nodes) without churn, run in y = z/alpha; its last step is the answer, as ours."""
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler(**LINEAR, use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    sigmas = torch.unique_consecutive(scheduler.sigmas.double())
    schedule = Discrete(table(scheduler).alphas_cumprod, "log_q")
    times = torch.cat([schedule.time(-torch.log(sigmas[:-1])), torch.zeros(1, dtype=F64)])
    model = mixture("M2", schedule)
    y = normals(64, 2) * sigmas[0]
    state = y.float()
    for k, t in enumerate(scheduler.timesteps):
        q = scheduler.sigmas[k].double()
        at = schedule.time(-torch.log(q)).clamp(max=1.0)
        answer = model(state.double() * schedule.alpha(at), at)
        state = scheduler.step(((state.double() - answer) / q).float(), t, state).prev_sample
    ours = plan(Heun(), schedule, times)(model, y * schedule.alpha(times[0]), None)
    assert rms(state.double(), ours) < 1e-4 * rms(ours, torch.zeros_like(ours))


class Recorder(nn.Module):
    def __init__(self, seen: list[Tensor], answer: Tensor):
        super().__init__()
        self.seen, self.answer = seen, answer

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x_t.clone())
        return self.answer


def truth(scheduler: Any, end: float = 0.0) -> Tensor:
    """Exact end for the start `normals(64, 2)` at the first timestep of the linear table, as a state of the process."""
    schedule = table(scheduler)
    q0 = float(schedule.q(1.0))
    start, exact = mixture_ode("M2", 64, q0, end)
    # the start of `mixture_ode` is n sqrt(1 + q0^2) in y = z/alpha, which is z = n
    torch.testing.assert_close(start * schedule.alpha(1.0), normals(64, 2), rtol=1e-9, atol=1e-9)
    return exact / (1 + end**2) ** 0.5
