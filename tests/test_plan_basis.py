"""Plans in an eigenbasis: the table is the coroutine, in coordinates; through JSON, in half the digits, with noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.errors import BadInput, HastenError
from hasten.exact import Gaussian
from hasten.plan import Plan, plan
from hasten.plan.basis import Basis, Coordinates, dct_matrix
from hasten.plan.draw import draw
from hasten.plan.tracing import Traced
from hasten.samplers import DDIM, Heun
from hasten.sampling import Noise, Query, walk
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.times import Trailing, UniformLambda, UniformTime

F64 = torch.float64
SHAPE = (2, 3, 4)
MEAN = torch.linspace(-0.5, 0.8, 24, dtype=F64).reshape(SHAPE)
VARIANCE = torch.linspace(0.1, 2.0, 24, dtype=F64).reshape(SHAPE)
TURN = torch.linalg.qr(torch.randn(24, 24, dtype=F64, generator=torch.Generator().manual_seed(1)))[0]
BASES = {
    "identity": Basis(MEAN, VARIANCE),
    "scalar": Basis(MEAN, torch.tensor(0.4)),
    "any shape": Basis(torch.zeros((), dtype=F64), torch.tensor(0.4)),
    "dct": Basis(MEAN, VARIANCE, "dct"),
    "rows": Basis(MEAN, VARIANCE[..., :1], "dct"),
    "matrix": Basis(MEAN, VARIANCE, "matrix", TURN),
}
bases = pytest.mark.parametrize("basis", BASES.values(), ids=list(BASES))


class Curved(nn.Module):
    """A denoiser that is not linear, so that a wrong table cannot hide."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return 0.7 * torch.tanh(2 * x_t.roll(1, -1) / self.schedule.prior_std(t).to(x_t.dtype)) + 0.2 * t.to(x_t.dtype)


@dataclass(frozen=True)
class Directed:
    """DDIM with an answer corrected by the one before and churned in a way that differs from direction to direction."""

    basis: Basis
    stir: float = 0.0
    skip: float = 0.0  # the share of the way that it moves without asking
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def nfe(self, steps: int) -> int:
        return steps

    def steps(self, schedule: Any, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        v = self.basis.values
        u = self.basis.to(x, schedule.alpha(times[0]))
        if self.skip:
            times = torch.cat([times[:1] * (1 - self.skip) + times[1:2] * self.skip, times[1:]])
            u = u * (1 + v)
        before = None
        for t, s in zip(times, times[1:]):
            d = self.basis.to((yield Query(self.basis.back(u, schedule.alpha(t)), t)))
            mixed = d if before is None else d + (v / (4 + v)) * (d - before)
            gain = v / (v + schedule.sigma(s) ** 2)
            u = (1 - gain) * u + gain * mixed
            if self.stir:
                u = u + self.stir * torch.sqrt(v) * self.basis.to(noise(), 0.0)
            before = d
        return self.basis.back(u, schedule.alpha(times[-1]))


@bases
def test_there_and_back(basis: Basis) -> None:
    x = torch.randn(3, *SHAPE, dtype=F64)
    u = basis.to(x, 0.7)
    assert isinstance(u, Coordinates)
    assert (basis.back(u, 0.7) - x).abs().max() < 1e-14
    off = (x - 0.7 * basis.mean).square().flatten(1).sum(1)
    assert (u.value.square().flatten(1).sum(1) - off).abs().max() < 1e-12  # orthogonal
    assert basis.back(basis.to(x.float(), 0.3), 0.3).dtype == torch.float32


def test_the_cosine_transform() -> None:
    scipy_fft = pytest.importorskip("scipy.fft")
    x = torch.randn(3, *SHAPE, dtype=F64)
    expected = torch.from_numpy(scipy_fft.dctn((x - MEAN).numpy(), axes=(-2, -1), norm="ortho"))
    assert (BASES["dct"].coordinates(x) - expected).abs().max() < 1e-13
    assert (dct_matrix(7) @ dct_matrix(7).T - torch.eye(7)).abs().max() < 1e-14


def test_coordinates_whiten_the_data() -> None:
    """Data of covariance U diag(v) U^T have uncorrelated coordinates of variances v."""
    basis = BASES["matrix"]
    g = torch.Generator().manual_seed(0)
    u = torch.randn(40_000, *SHAPE, dtype=F64, generator=g) * VARIANCE.sqrt()
    x = basis.pixels(u)
    covariance = torch.cov(basis.coordinates(x).flatten(1).T)
    assert (covariance - torch.diag(VARIANCE.flatten())).abs().max() < 0.06


@bases
@pytest.mark.parametrize("stir, skip", [(0.0, 0.0), (0.2, 0.5)])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(offset=0.0), EDM()], ids=lambda s: type(s).__name__)
def test_plan_is_the_coroutine(basis: Basis, schedule: Schedule, stir: float, skip: float) -> None:
    sampler = Directed(basis, stir, skip)
    for times in (UniformLambda()(schedule, 6), Trailing()(schedule, 2), UniformTime(end=0.1)(schedule, 3)):
        noise = Noise(range(4), SHAPE, F64)
        x = schedule.prior_std(times[0]) * noise.initial()
        compiled = plan(sampler, schedule, times)
        expected = walk(sampler, Curved(schedule), x, times, noise)
        scale = 1e-12 * max(1.0, float(expected.abs().max()), float(x.abs().max()))
        assert (compiled(Curved(schedule), x, noise.rows(slice(None))) - expected).abs().max() < scale
        again = Plan.from_json(compiled.to_json())
        assert torch.equal(
            again(Curved(schedule), x, noise.rows(slice(None))), compiled(Curved(schedule), x, noise.rows(slice(None)))
        )
        assert again.to_json() == compiled.to_json() and again.basis == basis and again.begin == compiled.begin
        assert compiled.B.shape == (compiled.nfe, compiled.nfe, basis.groups) and compiled.stochastic == bool(stir)
        assert int((compiled.B != 0).any(-1).sum(1).max()) <= 2 and not compiled.A.any()
        drawn = draw(Curved(schedule), sampler, times, noise.rows(slice(None)))
        assert (drawn - draw(Curved(schedule), None, times, noise.rows(slice(None)), plan=again)).abs().max() < scale


def test_the_formula() -> None:
    """What the docstring says the tables mean, written out."""
    basis, schedule = BASES["dct"], VPLinear()
    compiled = plan(Directed(basis, 0.2), schedule, UniformLambda()(schedule, 4))
    x = torch.randn(2, *SHAPE, dtype=F64)
    noise = Noise([0, 1], SHAPE, F64)
    found = compiled(Curved(schedule), x, noise.rows(slice(None)))
    xi = [basis.coordinates(noise(), 0.0) for _ in range(compiled.C.shape[1])]
    at = lambda numbers: numbers[basis.index]  # noqa: E731
    alpha = schedule.alpha(compiled.times)
    states = [at(compiled.start[0]) * basis.coordinates(x, alpha[0])]
    answers: list[Tensor] = []
    for k in range(compiled.nfe):
        answers.append(basis.coordinates(Curved(schedule)(basis.pixels(states[k], alpha[k]), compiled.times[k])))
        row = at(compiled.a[k]) * states[k] + sum(at(compiled.C[k, j]) * draw_ for j, draw_ in enumerate(xi))
        row = row + sum(at(compiled.A[k, j]) * state for j, state in enumerate(states[:k]))
        states.append(row + sum(at(compiled.B[k, j]) * answer for j, answer in enumerate(answers)))
    assert (basis.pixels(states[-1], alpha[-1]) - found).abs().max() < 1e-12


def test_one_group_is_as_many_numbers_as_no_basis() -> None:
    """With v = 1 and m = 0 in pixels, the basis changes nothing."""
    schedule, times = Flow(), Trailing()(Flow(), 5)
    plain = Basis(torch.zeros((), dtype=F64), torch.ones((), dtype=F64))
    turned = Basis(0 * MEAN, torch.ones((), dtype=F64), "matrix", TURN)
    one, other = (plan(Directed(basis), schedule, times) for basis in (plain, turned))
    x = torch.randn(2, *SHAPE, dtype=F64)
    assert (one(Curved(schedule), x) - other(Curved(schedule), x)).abs().max() < 1e-13
    assert one.a.shape == (5, 1) and torch.equal(one.a, other.a)


def test_single_precision_and_autocast_keep_the_coordinates() -> None:
    basis, schedule = BASES["dct"], VPCosine(offset=0.0)
    compiled = plan(Directed(basis), schedule, Trailing()(schedule, 5))
    x = torch.randn(3, *SHAPE)
    exact = compiled(Curved(schedule), x.double())
    single = compiled(Curved(schedule), x)
    assert single.dtype == torch.float32 and (single - exact).abs().max() < 2e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(Curved(schedule), x), single)  # its own products are not of matrices


def test_marginals_are_those_of_the_coordinates() -> None:
    """Against a Monte Carlo run on Gaussian data in the basis."""
    basis, schedule, n = BASES["dct"], VPLinear(), 30_000
    compiled = plan(Directed(basis, 0.2, 0.5), schedule, UniformLambda()(schedule, 4))
    mean, variance = 0.1 * torch.arange(24, dtype=F64), 0.5 * VARIANCE.flatten()
    inner = Gaussian(mean, variance, schedule)

    class Turned(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            u = basis.coordinates(x_t, schedule.alpha(t)).flatten(1)
            return basis.pixels(inner(u, t).reshape(x_t.shape))

    g = torch.Generator().manual_seed(0)
    fresh = lambda: torch.randn(n, *SHAPE, generator=g, dtype=F64)  # noqa: E731
    t = torch.tensor(compiled.begin, dtype=F64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    u = a * mean + (a**2 * variance + s**2).sqrt() * fresh().flatten(1)
    result = compiled(Turned(), basis.pixels(u.reshape(n, *SHAPE), a), fresh)
    found = basis.coordinates(result, schedule.alpha(compiled.times[-1])).flatten(1)
    means, variances = compiled.marginals(mean, variance)
    assert (found.mean(0) - means[-1]).abs().max() < 5 * (variances[-1] / n).sqrt().max()
    assert (found.var(0) / variances[-1] - 1).abs().max() < 5 * (2 / n) ** 0.5


def test_gradient_in_the_times() -> None:
    basis, schedule = BASES["matrix"], VPLinear()
    x = torch.randn(2, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(3))

    def result(inner: Tensor) -> Tensor:
        times = torch.cat([inner.new_ones(1), inner, inner.new_full((1,), 0.05)])
        return plan(Directed(basis), schedule, times)(Curved(schedule), x).sum()

    inner = torch.tensor([0.7, 0.3], dtype=F64)
    (gradient,) = torch.autograd.grad(result(free := inner.clone().requires_grad_()), free)
    for i, step in enumerate(1e-6 * torch.eye(2, dtype=F64)):
        assert gradient[i].item() == pytest.approx(float(result(inner + step) - result(inner - step)) / 2e-6, rel=1e-5)


def test_groups() -> None:
    basis = Basis(MEAN, torch.tensor([0.1, 0.1, 0.4, 3.0]).expand(SHAPE).contiguous())
    assert basis.groups == 3 and torch.equal(basis.values[basis.index], basis.variance)
    few = BASES["dct"].grouped(5)
    assert few.groups == 5 and BASES["dct"].grouped(24) is BASES["dct"]
    ratio = (few.variance / VARIANCE).log().abs().max()
    assert ratio <= (VARIANCE.max() / VARIANCE.min()).log() / 5
    assert (few.variance.log().sum() - VARIANCE.log().sum()).abs() < 1e-10


def test_equal_numbers_are_equal_bases() -> None:
    again = Basis.from_dict(json.loads(json.dumps(BASES["matrix"].to_dict())))
    assert again == BASES["matrix"] and hash(again) == hash(BASES["matrix"]) and again != BASES["dct"]
    assert Basis(MEAN, VARIANCE + 1e-15) != Basis(MEAN, VARIANCE)


def test_the_table_tells_ranges() -> None:
    text = (
        plan(Directed(BASES["dct"], skip=0.5), VPLinear(), torch.tensor([1.0, 0.5, 0.2], dtype=F64))
        .table()
        .splitlines()
    )
    assert text[1] == "dct basis, 24 variances from 0.1 to 2"
    assert "u_0 = + [1.1, 3] u(t = 1.000000)".removeprefix("u_0 = + ") in text[2]
    assert text[3].startswith("t_0 = 0.75") and "] u_0 + [" in text[3] and text[3].endswith("] u0_0")


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Basis(MEAN, VARIANCE, "dtc"), "did you mean 'dct'"),
        (lambda: Basis(MEAN, 0 * VARIANCE), "positive"),
        (lambda: Basis(MEAN, torch.ones(5)), "does not fit"),
        (lambda: Basis(MEAN[0, 0], torch.ones(()), "dct"), "two axes"),
        (lambda: Basis(MEAN, VARIANCE, "matrix"), "go together"),
        (lambda: Basis(MEAN, VARIANCE, "matrix", torch.eye(5)), "24 x 24"),
        (lambda: Basis(MEAN, VARIANCE, "matrix", 2 * TURN), "orthogonal"),
        (lambda: Basis(MEAN * float("nan"), VARIANCE), "finite"),
        (lambda: BASES["dct"].to(torch.zeros(1, 5)), "made for"),
        (lambda: BASES["dct"].to(torch.zeros(1, *SHAPE)) + 1.0, "coordinates add"),
        (lambda: Basis.from_dict({"kind": "dct"}), "cannot be read"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()


def test_damaged_files_are_refused() -> None:
    compiled = plan(Directed(BASES["dct"]), VPLinear(), UniformTime()(VPLinear(), 3))
    for change, says in (
        (lambda d: d["basis"].update(kind="dtc"), "did you mean 'dct'"),
        (lambda d: d["basis"].pop("mean"), "basis"),
        (lambda d: d.pop("basis"), "shape"),
        (lambda d: d["B"][0][0].__setitem__(1, 1.0), "shape"),
        (lambda d: d["a"][0].pop(), "read|expected"),
    ):
        told = json.loads(compiled.to_json())
        change(told)
        with pytest.raises(BadInput, match=says):
            Plan.from_json(json.dumps(told))


def test_numbers_of_another_shape_are_refused() -> None:
    symbols = Traced(torch.ones(2, 3, 5, dtype=F64))
    assert torch.equal((torch.arange(5.0) * symbols).value[1, 2], torch.arange(5.0).double())
    for wrong in (symbols, Traced(torch.ones(2, 3, dtype=F64))):
        with pytest.raises(HastenError, match="0-d"):
            torch.ones(7) * wrong


def test_plans_without_a_basis_have_none() -> None:
    compiled = plan(Heun(churn=3.0), EDM(), UniformTime()(EDM(), 3))
    told = json.loads(compiled.to_json())
    assert compiled.basis is None and compiled.begin is None and not {"basis", "begin"} & set(told)
    assert hasten.plan(DDIM(), EDM(), UniformTime()(EDM(), 3)).a.ndim == 1
