"""Plans: the table is the algorithm, on every schedule, with both ends, with noise, with gradients, through JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.errors import BadInput, HastenError
from hasten.plan import Plan, plan
from hasten.samplers import DDIM, DDPM, DEIS, PLMS, DPMSolver, Heun, UniPC
from hasten.sampling import Noise, Query, walk
from hasten.schedules import EDM, VE, Discrete, Flow, Schedule, VPCosine, VPLinear, rescale_zero_snr
from hasten.times import CosineAngle, Trailing, UniformLambda, UniformTime

SAMPLERS = [
    DDIM(), DDIM(eta=0.5), DDPM(), DDPM(variance="large"), Heun(), Heun(churn=3.0), DPMSolver(order=1), DPMSolver(),
    DPMSolver(order=3), DPMSolver(order=3, multistep=False), DPMSolver(predict="eps"), DPMSolver(sde=True),
    UniPC(order=1), UniPC(), UniPC(order=3), UniPC(order=3, corrector=False), DEIS(), PLMS(),
]  # fmt: skip
SCHEDULES = [
    VPLinear(), VPCosine(offset=0.0), EDM(), VE(), Flow(), Discrete.linear(),
    rescale_zero_snr(Discrete.scaled_linear()),
]  # fmt: skip
samplers = pytest.mark.parametrize("sampler", SAMPLERS, ids=hasten.pick.format_spec)
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__}{'_pure' * s.zero_snr}")


class Curved(nn.Module):
    """A denoiser that is not linear, so that a wrong table cannot hide."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return 0.7 * torch.tanh(2 * x_t.roll(1, -1) / self.schedule.prior_std(t).to(x_t.dtype)) + 0.2 * t.to(x_t.dtype)


def states(compiled: Plan, x0: Tensor, x: Tensor, xi: Tensor) -> list[Tensor]:
    """Every state for given answers (K,), start () and draws (M,): the formula of the docstring, written out."""
    found = [compiled.start[0] * x + compiled.start[1:] @ xi]
    for k in range(compiled.nfe):
        past = torch.stack(found)
        X = compiled.A[k, : k + 1] @ past + compiled.a[k] * past[k]
        found.append(X + compiled.B[k] @ x0 + compiled.C[k] @ xi)
    return found


@samplers
@schedules
def test_plan_is_the_coroutine(sampler: Any, schedule: Schedule) -> None:
    for law, steps in ((UniformLambda(), 9), (Trailing(), 3), (UniformTime(end=0.1), 6), (Trailing(), 1)):
        times = law(schedule, steps)
        x = schedule.prior_std(times[0]) * Noise(range(4), (6,), torch.float64).initial()
        noise = Noise(range(4), (6,), torch.float64)
        compiled = plan(sampler, schedule, times)
        expected = walk(sampler, Curved(schedule), x, times, noise)
        found = compiled(Curved(schedule), x, noise.rows(slice(None)))
        assert bool(torch.isfinite(found).all())
        assert (found - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))
        assert compiled.nfe == compiled.steps == len(compiled.times) - 1
        if steps > 1 and times[-1] == 0:
            assert compiled.nfe == sampler.nfe(steps)


@samplers
@schedules
def test_rows_sum_to_the_schedule(sampler: Any, schedule: Schedule) -> None:
    """If every answer is x, a deterministic sampler stays on `alpha x + sigma eps` at each node."""
    compiled = plan(sampler, schedule, CosineAngle()(schedule, 8))
    alpha, sigma = schedule.alpha(compiled.times), schedule.sigma(compiled.times)
    xi = torch.zeros(compiled.C.shape[1], dtype=torch.float64)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    if not compiled.stochastic:
        noise_only = torch.stack(states(compiled, zero.expand(compiled.nfe), sigma[0], xi))
        assert (noise_only - sigma).abs().max() < 1e-11 * sigma.max()
    image_only = torch.stack(states(compiled, one.expand(compiled.nfe), alpha[0], xi))
    assert (image_only - alpha).abs().max() < 1e-11


@pytest.mark.parametrize(
    "sampler, most",
    [
        (DDIM(), 1), (DDIM(eta=1.0), 1), (DDPM(), 1), (Heun(), 2), (Heun(churn=3.0), 2), (DPMSolver(), 2),
        (DPMSolver(order=3), 3), (DPMSolver(order=3, multistep=False), 3), (DPMSolver(sde=True), 2),
        (UniPC(order=2), 3), (UniPC(order=3), 4), (UniPC(order=3, corrector=False), 3),
    ],
)  # fmt: skip
@schedules
def test_rows_are_sparse(sampler: Any, most: int, schedule: Schedule) -> None:
    """Order + 1 answers at the most, no other state, and one fresh draw."""
    compiled = plan(sampler, schedule, UniformLambda()(schedule, 12))
    assert int((compiled.B != 0).sum(1).max()) <= most
    assert not compiled.A.any()
    assert int((compiled.C != 0).sum(1).max() if compiled.C.numel() else 0) <= 1


@pytest.mark.parametrize("sampler", [DEIS(order=3), PLMS(order=4), DPMSolver(predict="eps")])
def test_histories_of_noise_predictions_stay_short(sampler: Any) -> None:
    """They need older states: on x0 alone each row would reach back to the first answer."""
    compiled = plan(sampler, VPLinear(), UniformTime()(VPLinear(), 30))
    used = (compiled.A != 0) | (compiled.B != 0)
    reach = [k - int(row.nonzero()[0]) for k, row in enumerate(used)]
    assert max(reach) < 6


def test_steps_that_forget_and_states_that_return() -> None:
    """Ancestral sampling from pure noise forgets its start; the last step is the answer itself."""
    compiled = plan(DDPM(), Flow(), Trailing()(Flow(), 4))
    assert compiled.a[0] == 0 and compiled.a[-1] == 0
    assert compiled.B[-1].tolist() == [0, 0, 0, 1] and not compiled.C[-1].any()
    assert bool((compiled.a[1:-1] > 0).all()) and int((compiled.C != 0).sum()) == 3


@pytest.mark.parametrize(
    "count, large, small, ddim",
    [
        (1000, 0.250752, 0.246125, 0.248490),
        (100, 0.258652, 0.218981, 0.236041),
        (20, 0.298455, 0.150507, 0.185283),
        (10, 0.358521, 0.104222, 0.130759),
        (5, 0.558423, 0.043970, 0.050644),
    ],
)
def test_marginals_on_a_gaussian(count: int, large: float, small: float, ddim: float) -> None:
    """Data N(.3, .25) on DDPM's own table, equally spaced entries: the published variances, and an unbiased mean."""
    schedule = Discrete.linear()
    index = torch.linspace(0, 999, count, dtype=torch.float64).round().flip(0)
    times = torch.cat([(index + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    mean, variance = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    for sampler, expected in ((DDPM(variance="large"), large), (DDPM(), small), (DDIM(eta=1.0), small), (DDIM(), ddim)):
        if count == 1000 and sampler != DDPM(variance="large"):
            continue  # a thousand rows take a while
        means, variances = plan(sampler, schedule, times).marginals(mean, variance)
        assert variances[-1].item() == pytest.approx(expected, abs=1.5e-6)
        assert (means[:, 0] - 0.3 * schedule.alpha(times)).abs().max() < 1e-12
        assert variances[0].item() == pytest.approx(
            float(0.25 * schedule.alpha(times[0]) ** 2 + schedule.sigma(times[0]) ** 2)
        )


@pytest.mark.parametrize("sampler", [DDPM(), DPMSolver(sde=True), Heun(churn=4.0), UniPC(order=3), DEIS()])
def test_marginals_agree_with_sampling(sampler: Any) -> None:
    """Against a Monte Carlo run of the same plan."""
    schedule, n = VPLinear(), 40_000
    compiled = plan(sampler, schedule, UniformLambda()(schedule, 6))
    mean, variance = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.25, 0.02]).double()
    model = hasten.exact.Gaussian(mean, variance, schedule)
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(n, 2, generator=g, dtype=torch.float64)  # noqa: E731
    t = compiled.times[0]
    means, variances = compiled.marginals(mean, variance)
    x = schedule.alpha(t) * mean + (schedule.alpha(t) ** 2 * variance + schedule.sigma(t) ** 2).sqrt() * draw()
    result = compiled(model, x, draw)
    assert (result.mean(0) - means[-1]).abs().max() < 5 * (variances[-1] / n).sqrt().max()
    assert (result.var(0) / variances[-1] - 1).abs().max() < 5 * (2 / n) ** 0.5


@samplers
def test_gradient_in_the_times(sampler: Any) -> None:
    schedule = VPCosine(offset=0.0)
    inner = torch.tensor([0.83, 0.61, 0.4, 0.22], dtype=torch.float64)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[None]

    def result(inner: Tensor) -> Tensor:
        ends = inner.new_ones(1), inner.new_zeros(1)
        compiled = plan(sampler, schedule, torch.cat([ends[0], inner, ends[1]]))
        return compiled(Curved(schedule), x, Noise([0], (6,), torch.float64))

    free = inner.clone().requires_grad_()
    g = torch.ones(6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((result(free) * g).sum(), free)
    for i, direction in enumerate(torch.eye(4, dtype=torch.float64)):
        numeric = ((result(inner + 1e-6 * direction) - result(inner - 1e-6 * direction)) * g).sum() / 2e-6
        assert gradient[i].item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-7)


def test_fitted_coefficients_get_gradients() -> None:
    compiled = plan(DPMSolver(), VPLinear(), UniformLambda()(VPLinear(), 4))
    B = compiled.B.clone().requires_grad_()
    fitted = Plan(compiled.times, compiled.start, compiled.a, compiled.A, B, compiled.C)
    x = torch.ones(1, 3, dtype=torch.float64)
    result = fitted(Curved(VPLinear()), x)
    assert torch.equal(result.detach(), compiled(Curved(VPLinear()), x)) or torch.allclose(
        result, compiled(Curved(VPLinear()), x)
    )
    result.sum().backward()
    assert B.grad is not None and bool((B.grad[compiled.B != 0] != 0).all())


@samplers
def test_json_keeps_every_bit(sampler: Any) -> None:
    compiled = plan(sampler, VPCosine(), UniformLambda()(VPCosine(), 7))
    again = Plan.from_json(compiled.to_json())
    for name in ("times", "start", "a", "A", "B", "C"):
        assert torch.equal(getattr(again, name), getattr(compiled, name)), name
    assert again.sampler == hasten.pick.format_spec(sampler) and again.schedule == {"name": "VPCosine", "offset": 0.008}
    assert hasten.pick("samplers", again.sampler) == sampler
    assert again.to_json() == compiled.to_json()


def test_a_plan_file_is_small() -> None:
    compiled = plan(UniPC(order=3), VPCosine(), UniformLambda()(VPCosine(), 8))
    assert len(compiled.to_json()) < 2500


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d: d.update(schema=3), "schema 3"),
        (lambda d: d.pop("B"), "'B' is missing"),
        (lambda d: d["a"].append(1.0), "evaluations"),
        (lambda d: d["times"].append(0.0), r"times must be float64 \(5,\)"),
        (lambda d: d["B"][0].append([9, 1.0]), "column 9"),
        (lambda d: d["B"][0].append([3, 1.0]), "triangular"),
        (lambda d: d["a"].__setitem__(0, float("nan")), "finite"),
        (lambda d: d["times"].__setitem__(0, 1.5), r"\[0, 1\]"),
        (lambda d: d["a"].__setitem__(0, "x"), "cannot be read"),
        (lambda d: d["schedule"].update(name="VPcos"), "VPCosine"),
    ],
)
def test_a_damaged_plan_is_refused(change: Callable[[dict], Any], says: str) -> None:
    told = json.loads(plan(DDIM(), VPLinear(), UniformTime()(VPLinear(), 4)).to_json())
    change(told)
    with pytest.raises(BadInput, match=says):
        Plan.from_json(json.dumps(told))
    with pytest.raises(BadInput, match="not JSON"):
        Plan.from_json("{")


@dataclass(frozen=True)
class Odd:
    """A sampler that breaks one rule of linear samplers."""

    how: str
    linear: ClassVar[Any] = True
    order: ClassVar[int] = 1

    def nfe(self, steps: int) -> int:
        return steps

    def steps(self, schedule: Any, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        x0 = yield Query(x, times[0] if self.how != "times" else times)
        if self.how == "clamp":
            x0 = x0.clamp(-1, 1)
        if self.how == "product":
            x0 = x0 * x0
        if self.how == "constant":
            x0 = x0 + 1.0
        if self.how == "inf":
            x0 = x0 * torch.tensor(float("inf"))
        return x0 if self.how != "number" else 3.0


@pytest.mark.parametrize(
    "how, says",
    [
        ("clamp", "'clamp'"), ("product", "state by a state"), ("constant", "not a float"), ("inf", "infinite"),
        ("number", "float"), ("times", "shape"),
    ],
)  # fmt: skip
def test_what_is_not_linear_is_refused(how: str, says: str) -> None:
    with pytest.raises(HastenError, match=says):
        plan(Odd(how), VPLinear(), UniformTime()(VPLinear(), 3))


def test_a_sampler_that_says_it_is_not_linear_is_refused() -> None:
    class Adaptive(Odd):
        linear = False

    with pytest.raises(HastenError, match="values it sees"):
        plan(Adaptive(""), VPLinear(), UniformTime()(VPLinear(), 3))
    with pytest.raises(BadInput, match="strictly decrease"):
        plan(DDIM(), VPLinear(), torch.tensor([0.2, 0.8]))


@dataclass(frozen=True)
class Stirred:
    """Adds noise before it first asks, and keeps two draws alive for later rows."""

    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def nfe(self, steps: int) -> int:
        return 3

    def steps(self, schedule: Any, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        x = 0.5 * x + noise() * 2
        first, unused, second = noise(), noise(), noise()
        a = yield Query(x, times[0])
        b = yield Query(0.5 * x - a + first, times[0] / 2)
        c = yield Query(-(a / 4) + b + second - first, times[0] / 4)
        return sum([x, c, second]) - 0 * unused


def test_noise_before_the_first_query_and_kept_draws() -> None:
    schedule, times = VPLinear(), UniformTime()(VPLinear(), 1)
    compiled = plan(Stirred(), schedule, times)
    assert compiled.start.tolist() == [0.5, 2, 0, 0, 0] and compiled.stochastic
    x = torch.randn(3, 5, dtype=torch.float64)
    noise = Noise(range(3), (5,), torch.float64)
    expected = walk(Stirred(), Curved(schedule), x, times, noise)
    assert (compiled(Curved(schedule), x, noise.rows(slice(None))) - expected).abs().max() < 1e-14
    assert (
        Plan.from_json(compiled.to_json())(Curved(schedule), x, noise.rows(slice(None))) - expected
    ).abs().max() < 1e-14


def test_the_loop_keeps_the_dtype_and_does_not_touch_its_inputs() -> None:
    compiled = plan(UniPC(order=3), VPLinear(), UniformLambda()(VPLinear(), 6))
    x = torch.randn(2, 4)
    seen: list[tuple[Tensor, Tensor]] = []

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        answer = x_t.tanh()
        seen.extend([(x_t, x_t.clone()), (answer, answer.clone())])
        return answer

    before = x.clone()
    assert compiled(denoiser, x).dtype == torch.float32
    assert torch.equal(x, before) and all(torch.equal(now, then) for now, then in seen)


def test_history_is_let_go() -> None:
    """A two-step method holds three answers at the most, however long it runs."""
    import weakref

    compiled = plan(DPMSolver(), VPLinear(), UniformLambda()(VPLinear(), 20))
    alive: list[int] = []
    answers: list[weakref.ref] = []

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in answers))
        answer = x_t * 0.5
        answers.append(weakref.ref(answer))
        return answer

    compiled(denoiser, torch.randn(1, 4))
    assert max(alive) <= 2


def test_table() -> None:
    text = plan(DPMSolver(), VPCosine(offset=0.0), Trailing()(VPCosine(offset=0.0), 3)).table()
    assert text.splitlines()[0] == "dpm on VPCosine: 3 network evaluations"
    assert text.splitlines()[1].startswith("t_0 = 1.000000   x_1 = 0.866025 x_0 + 0.5 x0_0")
    assert text.splitlines()[-1] == "t_3 = 0.000000"


def test_called_as_a_module() -> None:
    times = UniformTime()(VPLinear(), 3)
    assert hasten.plan(DDIM(), VPLinear(), times).to_json() == plan(DDIM(), VPLinear(), times).to_json()
    assert hasten.plan.Plan is hasten.Plan is Plan


def test_a_step_costs_a_quarter_of_a_common_one() -> None:
    """Against diffusers' UniPC scheduler on a 1x4x64x64 latent, without the network, interleaved; the best of many."""
    diffusers = pytest.importorskip("diffusers")
    x = torch.randn(1, 4, 64, 64)
    answer, steps = torch.randn_like(x), 20
    compiled = plan(UniPC(order=2), VPLinear(), UniformLambda()(VPLinear(), steps))
    peer = diffusers.UniPCMultistepScheduler(num_train_timesteps=1000, solver_order=2, prediction_type="sample")

    def ours() -> None:
        compiled(lambda x_t, t: answer, x)

    def theirs() -> None:
        state = x
        for t in peer.timesteps:
            state = peer.step(answer, t, state).prev_sample

    best = {ours: float("inf"), theirs: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(20):
            for run in best:
                peer.set_timesteps(steps)
                begin = time.perf_counter()
                run()
                best[run] = min(best[run], time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    assert best[ours] <= best[theirs] / 4, {run.__name__: f"{1e6 * s / steps:.0f} us/step" for run, s in best.items()}
