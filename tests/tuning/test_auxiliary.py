"""The density by maximum likelihood, and the criterion that chooses the time: for exact parts it is the same everywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Wrapper
from hasten.errors import BadInput
from hasten.exact import Gaussian, g8, m64
from hasten.nets.density import MixtureDensity
from hasten.samplers import DDIM
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.starts import Auxiliary
from hasten.tuning import TuningTask
from hasten.tuning.auxiliary import AuxiliaryDensity, fit_density, fit_mixture, kl_divergence, score_cost


def task(data: Any, labels: Any = None, n: int = 4000, seed: int = 0) -> TuningTask:
    def images(n: int) -> tuple[Tensor, Tensor | None]:
        x = data.sample(n, torch.Generator().manual_seed(n)).float()
        return x, None if labels is None else labels(x)

    return TuningTask(
        data, DDIM(), torch.tensor([1.0, 0.0]), tuple(data.sample(1).shape[1:]), images=images, n=n, seed=seed
    )


@pytest.mark.parametrize("null_label", [None, 0, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_every_label_has_its_density_whatever_the_null_label_is(null_label: int | None, labelled: bool) -> None:
    """The model gets labels that it knows: those of the images, else its null label; each label has a density."""
    recorded: list[Tensor | None] = []

    class Labelled(Wrapper):
        classes = 2 if null_label == 2 else 3

        def forward(self, x_t: Tensor, t: Any, label: Tensor | None = None) -> Tensor:
            recorded.append(label)
            return self.denoiser(x_t, t)

    data = g8(VPLinear())
    model = Labelled(data)
    model.null_label = null_label  # type: ignore[assignment]
    low = 1 if null_label == 0 else 0
    inputs = task(data, (lambda x: low + (x[:, 0] > 0).long()) if labelled else None, n=600)
    inputs.denoiser = model
    nu = AuxiliaryDensity(levels=(1.0, 2.0), rank=4).tune(inputs).parts["auxiliary"]
    if labelled:
        assert all(label is not None and set(label.tolist()) == {low, low + 1} for label in recorded)
    else:
        assert all((label is None) if null_label is None else bool((label == null_label).all()) for label in recorded)
    centre = nu.centre[[low, low + 1]]  # type: ignore[index]
    assert bool((centre[0, 0] < -0.1) & (centre[1, 0] > 0.1)) == labelled
    for null in (nu.classes, *(() if null_label is None else (null_label,))):
        assert torch.equal(nu.centre[null], nu.centre[nu.classes])  # type: ignore[index]


@pytest.mark.parametrize("schedule", [VPCosine(offset=0.0), VPLinear(), Flow(), EDM()], ids=lambda s: type(s).__name__)
def test_the_criterion_is_flat_where_nothing_is_wrong(schedule: Schedule) -> None:
    """Gaussian data, the exact denoiser, a fitted Gaussian: C is the same at every level, the entropy's own identity
    (I-MMSE). The score's part alone changes by a hundred times more."""
    data = g8(schedule)
    tuned = AuxiliaryDensity(levels=(0.5, 1.0, 2.0, 4.0, 8.0), rank=8, components=1).tune(task(data, n=20_000))
    costs = [tuned.figures[f"cost_{q:g}"] for q in (0.5, 1.0, 2.0, 4.0, 8.0)]
    gaps = [tuned.figures[f"divergence_{q:g}"] for q in (0.5, 1.0, 2.0, 4.0, 8.0)]
    assert max(costs) - min(costs) < 0.01
    assert gaps[0] - gaps[-1] > 0.05


def test_the_score_cost_is_the_mutual_information() -> None:
    """Its closed form for Gaussians: sum_j log(1 + v_j / q^2) / 2 between two levels, to quadrature and sampling."""
    schedule = VPCosine(offset=0.0)
    data = g8(schedule)
    x = data.sample(20_000, torch.Generator().manual_seed(0))
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cost = score_cost(data, [0.3, 0.6, 1.2, 2.4], x, None, e)

    def information(q: float) -> float:
        return float(0.5 * torch.log1p(data.variance / q**2).sum())

    for k, q in enumerate((0.3, 0.6, 1.2, 2.4)):
        assert abs(float(cost[k]) - (information(0.3) - information(q))) < 0.02
    assert abs(float(cost[-1]) - information(0.3)) < 0.02


class Wrong(Wrapper):
    """A denoiser that is wrong by a constant, and more so at high noise."""

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        x0 = self.denoiser(x_t, t, **cond)
        return x0 + 0.3 * torch.tanh(self.denoiser.schedule.q(t) / 4).to(x0.dtype)


def test_a_wrong_score_makes_an_early_start_pay_and_a_wrong_density_a_late_one() -> None:
    schedule = VPCosine(offset=0.0)
    data = m64(schedule)
    config = AuxiliaryDensity(levels=(0.3, 1.0, 3.0, 10.0), rank=64, components=1)
    wrong = task(data, n=8000)
    wrong.denoiser = Wrong(data)
    exact = config.tune(task(data, n=8000)).figures
    spoiled = config.tune(wrong).figures
    assert spoiled["level"] < exact["level"]  # ten components are not one: with the exact score, start late
    assert spoiled["cost_noise"] - exact["cost_noise"] > spoiled["cost_1"] - exact["cost_1"]
    assert exact["divergence_0.3"] > exact["divergence_10"]
    fixed = AuxiliaryDensity(levels=(0.3, 1.0), level=3.0, rank=16, components=1).tune(task(data, n=2000))
    assert fixed.figures["level"] == 3.0
    start = Auxiliary().bind({}, fixed.parts)
    assert start.time is not None and abs(float(schedule.q(start.time)) - 3.0) < 1e-9


def test_more_components_are_more_likely() -> None:
    """Held-out likelihood of a clearly mixed density; the fit of one component is exact: the data's covariance and the noise's."""
    schedule = VPCosine(offset=0.0)
    x = m64(schedule).sample(6000, torch.Generator().manual_seed(0))
    z = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = {}
    for K in (1, 10):
        nu = MixtureDensity((64,), rank=20, components=K)
        fit_density(nu, x[:5000], 0.1, None)
        result[K] = kl_divergence(nu, z[5000:], None, 0.1)
    assert result[10] < result[1] - 0.1
    off, one = x[:5000] - x[:5000].mean(0), MixtureDensity((64,), rank=64)
    fit_density(one, x[:5000], 0.1, None)
    L = one.basis @ one.factor[0, 0]
    assert (L @ L.T - off.T @ off / 5000 - 0.01 * torch.eye(64, dtype=torch.float64)).abs().max() < 1e-10


def test_expectation_maximisation_finds_three_clouds() -> None:
    generator = torch.Generator().manual_seed(3)
    true = torch.tensor([[4.0, 0.0], [-4.0, 1.0], [0.0, -5.0]], dtype=torch.float64)
    which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 6000, True, generator=generator)
    y = true[which] + 0.5 * torch.randn(6000, 2, generator=generator, dtype=torch.float64)
    weight, mean, cov = fit_mixture(y, 3, 0.01, 60, generator)
    order = [int((mean - m).square().sum(1).argmin()) for m in true]
    assert sorted(order) == [0, 1, 2]
    assert (mean[order] - true).abs().max() < 0.06
    assert (weight[order] - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.02
    assert (cov - 0.25 * torch.eye(2)).abs().max() < 0.04
    floor = fit_mixture(y, 3, 0.4, 20, generator)[2]
    assert float(torch.linalg.eigvalsh(floor).min()) > 0.4 - 1e-9


def test_classes_have_densities_of_their_own() -> None:
    schedule = VPCosine(offset=0.0)
    data = Gaussian(torch.zeros(4), torch.ones(4), schedule)
    data.null_label = 2  # type: ignore[assignment]
    inputs = task(data, labels=lambda x: (x[:, 0] > 0).long())
    nu = AuxiliaryDensity(levels=(0.2,), rank=2, components=1).tune(inputs).parts["auxiliary"]
    mean = nu.centre[:, 0] / float(schedule.alpha(nu.time))  # type: ignore[index,operator,arg-type]
    half = math.sqrt(2 / math.pi)
    assert (mean - torch.tensor([-half, half, 0.0])).abs().max() < 0.06


def test_images_without_labels_and_guidance() -> None:
    """Every class has the density of all; guidance does not enter the criterion."""
    from hasten.exact import m2
    from hasten.guides import CFG

    data = m2(VPCosine(offset=0.0), labels=[0, 0, 0, 1, 1, 1])
    config = AuxiliaryDensity(levels=(0.5, 1.0), rank=2, components=2)
    plain, guided = task(data, n=1000), task(data, n=1000)
    guided.denoiser = CFG(scale=5.0).wrap(data)
    one, two = config.tune(plain), config.tune(guided)
    nu = one.parts["auxiliary"]
    assert torch.equal(nu.mean[0], nu.mean[2]) and torch.equal(nu.factor[1], nu.factor[2])  # type: ignore[index]
    assert one.figures == two.figures


def test_bad_input() -> None:
    data = g8(VPLinear(beta_max=1.0))  # ends at q = .86
    with pytest.raises(BadInput, match="--data"):
        AuxiliaryDensity().tune(TuningTask(data, DDIM(), torch.tensor([1.0, 0.0]), (8,)))
    with pytest.raises(BadInput, match="ends at the level 0.8"):
        AuxiliaryDensity(levels=(0.5, 2.0)).tune(task(data))
    for wrong in ({"levels": ()}, {"levels": (0.0,)}, {"level": -1.0}, {"rank": 0}, {"components": 0}):
        with pytest.raises(BadInput):
            AuxiliaryDensity(**wrong)  # type: ignore[arg-type]
