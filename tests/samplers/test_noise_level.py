"""The noise-level sampler: betas solved exactly, the sheet's variances with an oracle, DDIM where nothing is adjusted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput, HastenError
from hasten.exact import Gaussian
from hasten.nets.noise_level import NoiseLevelNet
from hasten.plan import plan
from hasten.samplers import DDIM
from hasten.samplers.noise_level import NoiseLevel, betas, lam, log_abar
from hasten.sampling import Noise, walk
from hasten.schedules import EDM, VE, Discrete, Flow, SubVP, VPCosine, VPLinear
from tests.samplers.problems import ALL, F64, drive, ends, mixture

FAMILIES = ("linear", "fibonacci", "times")
NEVER: Any = ()


@pytest.mark.parametrize("family", ["linear", "fibonacci"])
@pytest.mark.parametrize("n", [2, 3, 6, 10, 20, 100])
def test_betas_multiply_to_the_target(family: str, n: int) -> None:
    """Bisection: exact to 1e-12, of the family's form, growing, from beta_0."""
    targets = torch.tensor([0.99, 0.7, 0.3, 0.05, 2e-3], dtype=F64)
    found = betas(torch.log(targets), n, family, 1e-4)
    torch.testing.assert_close((1 - found).prod(1), targets, rtol=1e-12, atol=0)
    assert bool((found > 0).all()) and bool((found <= 0.999).all()) and bool((found.diff() >= 0).all())
    free = found[found.max(1).values < 0.999]
    if family == "linear":
        torch.testing.assert_close(free.diff(n=2), torch.zeros_like(free)[:, 2:], rtol=0, atol=1e-13)
    else:
        torch.testing.assert_close(free[:, 2:], free[:, 1:-1] + free[:, :-2], rtol=1e-12, atol=0)
    assert len(free) >= 3
    # beta_0 as given, but where betas that do not fall would then reach too far
    least = torch.full((1, n), 1e-4, dtype=F64)
    for i in range(2, n if family == "fibonacci" else 0):
        least[0, i] = least[0, i - 1] + least[0, i - 2]
    scaled = torch.log1p(-least.clamp(max=0.999)).sum() < torch.log(targets)
    torch.testing.assert_close(found[~scaled, 0], torch.full_like(found[~scaled, 0], 1e-4), rtol=1e-12, atol=0)
    assert bool((found[scaled, 0] < 1e-4).all()) and bool((found[scaled, 0] == found[scaled, 1]).all())


def test_betas_at_the_limits() -> None:
    assert betas(torch.tensor([math.log(0.2)], dtype=F64), 1, "linear", 1e-4)[0, 0].item() == pytest.approx(0.8)
    # nearer to 1 than beta_0 allows: a smaller one, still exact
    near = betas(torch.log(torch.tensor([1 - 1e-5], dtype=F64)), 4, "linear", 1e-4)
    torch.testing.assert_close((1 - near).prod(1), torch.tensor([1 - 1e-5], dtype=F64), rtol=1e-12, atol=0)
    assert float(near.max() - near.min()) == 0
    # farther than betas of .999 reach: those
    far = betas(torch.log(torch.tensor([1e-5], dtype=F64)), 2, "linear", 1e-4)
    assert far[0].tolist() == pytest.approx([1e-4, 0.999])


@pytest.mark.parametrize(("n", "miss"), [(6, -0.21), (10, -0.11), (20, -0.05)])
def test_why_not_the_first_order_formula(n: int, miss: float) -> None:
    """w = -2 (log abar + n beta_0) / (n (n - 1)) misses the product of .3 by these shares; bisection does not."""
    w = -2 * (math.log(0.3) + n * 1e-4) / (n * (n - 1))
    assert math.prod(1 - 1e-4 - i * w for i in range(n)) / 0.3 - 1 == pytest.approx(miss, abs=0.006)
    exact = betas(torch.tensor([math.log(0.3)], dtype=F64), n, "linear", 1e-4)
    assert (1 - exact).prod().item() == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("family", ["linear", "fibonacci"])
def test_the_true_level_gives_the_list_that_it_had(family: str) -> None:
    whole = betas(torch.tensor([math.log(0.02)], dtype=F64), 10, family, 1e-4)[0]
    for n in (3, 6, 10):
        true = torch.log1p(-whole[:n]).sum()
        torch.testing.assert_close(betas(true[None], n, family, 1e-4)[0], whole[:n], rtol=1e-6, atol=0)


def test_levels_and_their_inverse() -> None:
    lams = torch.tensor([-math.inf, -20.0, -3.0, 0.0, 2.0, 9.0], dtype=F64)
    torch.testing.assert_close(lam(log_abar(lams)), lams, rtol=1e-9, atol=1e-12)
    schedule = VPCosine(0.0)
    times = torch.tensor([0.9, 0.5, 0.01], dtype=F64)
    torch.testing.assert_close(log_abar(schedule.lam(times)), 2 * torch.log(schedule.alpha(times)))


V, D = 0.25, 4096


def oracle(z: Tensor) -> Tensor:
    """abar of isotropic data N(0, V I), from the size of z alone."""
    return ((z.square().mean(1) - 1) / (V - 1)).clamp(1e-5, 0.9999)


def final_variance(sampler: NoiseLevel, n: int, schedule: Any = None, scale: float = 1.0) -> float:
    schedule = schedule or Discrete.linear()
    model = Gaussian(torch.zeros(D), torch.full((D,), V), schedule)
    times = torch.cat([torch.linspace(1, 0.001, n, dtype=F64), torch.zeros(1, dtype=F64)])
    x = Noise(range(2), (D,), dtype=F64).initial()
    x = scale * x / x.square().mean(1, keepdim=True).sqrt()  # what is left of chance is gone, as for infinite d
    return walk(sampler, model, x, times).square().mean().item()


@pytest.mark.parametrize(("n", "plain", "adjusted"), [(6, 0.108, 0.168), (10, 0.144, 0.214), (20, 0.187, 0.245)])
def test_variance_of_a_gaussian_with_an_oracle(n: int, plain: float, adjusted: float) -> None:
    """N(0, .25 I), d = 4096, linear betas from 1e-4 to the product of the linear table, DDIM: before and after (.25 is
    the truth). The adjusted ones of the sheet are met to .004: they depend on what is done while the estimate is
    saturated."""
    assert final_variance(NoiseLevel(updates=NEVER), n) == pytest.approx(plain, abs=1.2e-3)
    assert final_variance(NoiseLevel(estimator=oracle), n) == pytest.approx(adjusted, abs=4e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adjustment_helps_every_family(family: str) -> None:
    for n in (6, 10):
        plain, adjusted = (final_variance(NoiseLevel(family, updates=u, estimator=oracle), n) for u in (NEVER, None))
        assert abs(adjusted - V) < abs(plain - V)


def test_a_saturated_estimate_is_not_believed() -> None:
    """From a start that is 1.1 times too large the oracle says "more than all noise" at first. Believing it would be
    worse than nothing; unbelieved, the steps are those of the list until the estimate means something."""
    plain, adjusted = (final_variance(NoiseLevel(updates=u, estimator=oracle), 6, scale=1.1) for u in (NEVER, None))
    assert adjusted >= plain - 1e-9
    for constant in (1e-5, 0.9999, 1.0, 0.0):
        blind = NoiseLevel(estimator=lambda z, c=constant: torch.full((len(z),), c, dtype=F64))
        assert final_variance(blind, 6) == final_variance(NoiseLevel(updates=NEVER), 6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))
def test_without_updates_on_the_grid_it_is_ddim(schedule: Any, eta: float) -> None:
    """On every schedule, from its own noisy end: scaling to the variance-preserving path changes nothing. Nor does an
    estimator that confirms the grid."""
    model, times = mixture("M2", schedule), ends(schedule, 7)
    levels = iter(torch.exp(log_abar(schedule.lam(times[1:-1]))).tolist())
    confirm = NoiseLevel("times", eta, estimator=lambda z: torch.full((len(z),), next(levels), dtype=F64))
    results = []
    for sampler in (DDIM(eta), NoiseLevel("times", eta, updates=NEVER), confirm):
        noise = Noise([3, 4, 5], (2,), dtype=F64)
        x = noise.initial() * float(schedule.prior_std(times[0]))
        results.append(walk(sampler, model, x, times, noise))
    assert bool(torch.isfinite(results[0]).all())
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_schedules_are_one(family: str) -> None:
    """From the same noise at the same level the samples are the same on every schedule, with the oracle at work."""
    results = []
    for schedule in (VPLinear(), VPCosine(), EDM(), VE(), Flow(), SubVP()):
        model = Gaussian(torch.zeros(64), torch.full((64,), V), schedule)
        times = schedule.time(torch.tensor([-3.0, -2.0, -1.0, -0.3, 0.4, 1.5], dtype=F64))
        times = torch.cat([times, torch.zeros(1, dtype=F64)])
        x = Noise(range(4), (64,), dtype=F64).initial() * float(schedule.prior_std(times[0]))
        results.append(walk(NoiseLevel(family, estimator=oracle), model, x, times))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_lists_of_their_own(family: str) -> None:
    """Times differ within the batch, never go back up, and a sample alone takes the same steps."""
    schedule = Flow()
    model = Gaussian(torch.zeros(16), torch.full((16,), V), schedule)
    sampler = NoiseLevel(family, estimator=oracle)
    times = ends(schedule, 8)
    x = Noise(range(5), (16,), dtype=F64).initial()
    together, asked = drive(sampler, schedule, model, x, times)
    alone = torch.cat([walk(sampler, model, x[k : k + 1], times) for k in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    path = torch.stack(asked)
    assert path.shape == (8, 5) and sampler.nfe(8) == 8
    assert bool((path[1:] <= path[:-1] + 1e-12).all())
    assert float(path[4].std()) > 1e-3


def test_a_wild_estimator_cannot_send_a_sample_back() -> None:
    schedule, generator = VPCosine(), torch.Generator().manual_seed(0)
    model = Gaussian(torch.zeros(16), torch.full((16,), V), schedule)
    for family in FAMILIES:
        wild = NoiseLevel(family, estimator=lambda z: torch.rand(len(z), generator=generator, dtype=F64))
        z, asked = drive(wild, schedule, model, Noise(range(9), (16,), dtype=F64).initial(), ends(schedule, 12))
        path = torch.stack(asked)
        assert bool((path[1:] <= path[:-1] + 1e-12).all()) and bool((path > 0).all())
        assert bool(torch.isfinite(z).all())


def test_updates_are_where_they_are_asked_for() -> None:
    calls = []

    def count(z: Tensor) -> Tensor:
        calls.append(len(z))
        return oracle(z)

    final_variance(NoiseLevel(estimator=count), 6)
    assert len(calls) == 5  # the last step's result is no state
    calls.clear()
    final_variance(NoiseLevel(updates=(1, 3, 17), estimator=count), 6)
    assert len(calls) == 2


def test_images_keep_their_dtype_and_a_network_will_do() -> None:
    torch.manual_seed(0)
    net = NoiseLevelNet(1, 4)
    sampler = NoiseLevel(eta=1.0).bind({}, {"noise_level": net})
    schedule = VPCosine(0.0)
    model = Gaussian(torch.zeros(1, 8, 8), torch.full((1, 8, 8), V), schedule)
    noise = Noise(range(3), (1, 8, 8))
    found = walk(sampler, model, noise.initial(), ends(schedule, 5), noise)
    assert found.dtype == torch.float32 and found.shape == (3, 1, 8, 8) and bool(torch.isfinite(found).all())
    assert not found.requires_grad


def test_refusals() -> None:
    schedule = VPCosine()
    with pytest.raises(HastenError, match="levels follow an estimate"):
        plan(NoiseLevel(estimator=oracle), schedule, ends(schedule, 4))
    with pytest.raises(BadInput, match="hasten tune MODEL --method noise_level"):
        NoiseLevel().bind({}, {})
    assert NoiseLevel(updates=NEVER).bind({}, {}) == NoiseLevel(updates=NEVER)
    model = Gaussian(torch.zeros(2), torch.ones(2), schedule)
    with pytest.raises(BadInput, match="hasten tune MODEL --method noise_level"):
        walk(NoiseLevel(), model, torch.zeros(1, 2), ends(schedule, 4))
    with pytest.raises(BadInput, match="ends at t = 0"):
        walk(NoiseLevel(estimator=oracle), model, torch.zeros(1, 2), torch.tensor([0.9, 0.1], dtype=F64))
    for options, word in (
        ({"family": "fibonaci"}, "did you mean 'fibonacci'"),
        ({"eta": 1.5}, r"\[0, 1\]"),
        ({"beta": 0.0}, "beta"),
        ({"updates": (0, 1)}, "from 1"),
    ):
        with pytest.raises(BadInput, match=word):
            NoiseLevel(**options)
