"""Continued features: exact for polynomials, fitted weights, and key steps searched with them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators import SamplingContext
from hasten.accelerators._caching.fit import FeatureRecord, fit_weights, improve_key_steps, record_features
from hasten.accelerators._caching.forecast import (
    HISTORY,
    Extrapolation,
    angles,
    chebyshev_weights,
    combine_features,
    linear_weights,
    resolve_extrapolate,
)
from hasten.accelerators.deep_cache import DeepCache
from hasten.accelerators.encoder_propagation import EncoderPropagation
from hasten.errors import BadInput
from hasten.pick import format_spec, pick
from hasten.samplers import DDIM
from hasten.schedules import VPCosine
from tests.accelerators._tiny import (
    Transformer,
    compiled,
    context_of,
    denoiser_of,
    random_,
    relative,
    sampled,
    unet,
)

F64 = torch.float64
PLAN = compiled(DDIM(), 16)
KEYS = (0, 1, 3, 6, 9, 12)


def nodes(n: int, seed: int = 0) -> Tensor:
    """n increasing points in [-1, 1]."""
    return (2 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64) - 1).sort().values


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_polynomials_in_the_basis_are_reproduced_exactly(degree: int) -> None:
    """Without a ridge all of the degree, from just enough nodes and from more; one degree higher is not."""
    for n in (degree + 1, degree + 3):
        x, at = nodes(n), torch.tensor(0.97, dtype=F64)
        weights = chebyshev_weights(x, at, degree, ridge=0.0)
        for power in range(degree + 1):
            assert float(weights @ x**power) == pytest.approx(float(at**power), abs=1e-9)
        assert abs(float(weights @ x ** (degree + 1) - at ** (degree + 1))) > 1e-4


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1e9])
def test_straight_lines_are_exact_with_any_ridge(ridge: float) -> None:
    """And with a large one the series is that line."""
    x, at = nodes(5), torch.tensor(0.9, dtype=F64)
    weights = chebyshev_weights(x, at, 4, ridge)
    for power in (0, 1):
        assert float(weights @ x**power) == pytest.approx(float(at**power), abs=1e-9)
    assert torch.allclose(weights, linear_weights(x, at), atol=1e-6) == (ridge == 1e9)
    at_node = chebyshev_weights(x, x[-1], 4, ridge)
    torch.testing.assert_close(at_node, torch.eye(5, dtype=F64)[-1], rtol=0, atol=1e-9)


def test_coefficients_are_those_of_the_penalised_least_squares() -> None:
    """By the normal equations, for values that are no polynomial."""
    x, at, M, ridge = nodes(5, 1), torch.tensor(0.8, dtype=F64), 3, 0.05
    values = torch.exp(x) * torch.sin(5 * x)
    T = torch.stack([torch.cos(m * torch.arccos(torch.cat([x, at[None]]))) for m in range(1, M + 1)], -1)
    design, change = T[:4] - T[4], values[:4] - values[4]
    line = torch.zeros(M, dtype=F64)
    line[0] = (values[4] - values[3]) / (x[4] - x[3])
    c = torch.linalg.solve(design.T @ design + ridge * torch.eye(M, dtype=F64), design.T @ change + ridge * line)
    expected = values[4] + (T[5] - T[4]) @ c
    assert float(chebyshev_weights(x, at, M, ridge) @ values) == pytest.approx(float(expected), abs=1e-9)


def test_sums_of_feature_trees() -> None:
    """Weights of each tensor or one list for all; what is not floating point, and None, is the newest's."""

    def tree(seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        return [
            torch.randn(2, 3, generator=g),
            {"a": torch.randn(2, 1, generator=g), "n": torch.full((2,), seed)},
            None,
        ]

    one, two = tree(1), tree(2)
    both = combine_features([one, two], [[[0.0, 1.0]], [[-1.0, 2.0]]])
    torch.testing.assert_close(both[0], torch.cat([two[0], 2 * two[0] - one[0]]))
    assert both[1]["n"].tolist() == [2, 2, 2, 2] and both[2] is None
    each = combine_features([one, two], [[[0.5, 0.7], [0.0, 3.0], [0.0, 1.0]]])
    torch.testing.assert_close(each[0], 0.5 * one[0] + 0.7 * two[0])
    torch.testing.assert_close(each[1]["a"], 3 * two[1]["a"])
    assert combine_features([one, two], [[[0.0, 1.0]]])[0] is two[0]  # reused, not copied


def gram(features: Tensor) -> FeatureRecord:
    """The record of features (L, N, entries)."""
    return FeatureRecord(features @ features.transpose(1, 2), torch.ones(features.shape[1], dtype=F64))


def test_fitted_weights_are_the_least_squares_solution() -> None:
    features = torch.randn(2, 10, 500, generator=torch.Generator().manual_seed(0), dtype=F64).cumsum(1)
    record, keys = gram(features), (0, 2, 5)
    fitted = fit_weights(record, keys, torch.linspace(1.5, 0.1, 10, dtype=F64))
    for k, seen in ((1, (0,)), (4, (0, 2)), (8, (0, 2, 5))):
        weights = torch.tensor(fitted.weights(k, seen), dtype=F64)
        for own, values in zip(weights, features):
            expected = torch.linalg.lstsq(values[list(seen)].T, values[k]).solution
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
            error = (own @ values[list(seen)] - values[k]).square().sum() / values[k].square().sum()
            assert float(error) < 0.99
        residual = torch.stack(
            [(w @ v[list(seen)] - v[k]).square().sum() / v[k].square().sum() for w, v in zip(weights, features)]
        )
        torch.testing.assert_close(record.errors(weights, k, seen), residual, rtol=1e-6, atol=1e-9)
    # a set of key steps that was not fitted, as after a change of the conditions: a line
    assert fitted.weights(8, (2, 5)) == Extrapolation(1, fitted.angles).weights(8, (2, 5))


def test_the_search_moves_key_steps_to_lower_cost() -> None:
    """A cost with one minimum is descended to it; the first key step stays."""

    def cost(keys: Any) -> float:
        return float(sum((key - goal) ** 2 for key, goal in zip(keys, (3, 5, 11, 17))))

    assert improve_key_steps((0, 1, 2, 3), 20, cost) == (0, 5, 11, 17)


def recorded(network: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, FeatureRecord]:
    """An accelerated denoiser, and the record that its calibration made."""
    import hasten.accelerators._caching.fit as fit

    records: list[FeatureRecord] = []

    def recording(*arguments: Any) -> FeatureRecord:
        records.append(record_features(*arguments))
        return records[-1]

    monkeypatch.setattr(fit, "record_features", recording)
    plain = denoiser_of(network)
    fast = EncoderPropagation(**options).apply(plain, context_of(PLAN, plain))
    return fast, records[0]


@pytest.mark.parametrize("network", [unet(), random_(Transformer(), 0.3)], ids=["unet", "transformer"])
def test_found_key_steps_cost_little_more_than_any_neighbour(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the forecast in the loop: what the search minimises is the cost of the weights that then run."""
    from hasten.accelerators._caching.fit import _Forecast

    for extrapolate in (1, "chebyshev", "fitted"):
        fast, record = recorded(
            network, monkeypatch, keys="found", budget=5, samples=4, extrapolate=extrapolate, seed=7
        )
        assert len(fast.keys) == 5 and fast.keys[0] == 0
        costs = _Forecast(record, Extrapolation(extrapolate, angles(fast.times, fast.schedule)))
        best = costs.cost(fast.keys)
        assert best <= costs.cost([0, 3, 6, 9, 12])  # evenly spaced
        for number, move in itertools.product(range(1, 5), (-1, 1)):
            moved = sorted({*fast.keys} - {fast.keys[number]} | {fast.keys[number] + move})
            if len(moved) == 5 and moved[-1] < 16:
                assert costs.cost(moved) >= 0.5 * best  # the weights are fitted to what reuse itself changes


@pytest.mark.parametrize("network", [unet(), random_(Transformer(), 0.3)], ids=["unet", "transformer"])
def test_fitted_features_are_nearer_than_reused_ones(network: nn.Module) -> None:
    """Other seeds than the fit saw, guidance, batches of decoders; all ways agree where all are key steps."""
    plain = denoiser_of(network)
    context, expected = context_of(PLAN, plain, 3.0), sampled(plain, PLAN)
    errors = {}
    for extrapolate in (0, 1, "chebyshev", "fitted"):
        way: Any = EncoderPropagation(KEYS, extrapolate=extrapolate, samples=6, parallel=3)
        fast = way.apply(plain, context)
        errors[extrapolate] = relative(sampled(fast, PLAN), expected)
        serial = EncoderPropagation(KEYS, extrapolate=extrapolate, samples=6).apply(plain, context)
        assert relative(sampled(fast, PLAN), sampled(serial, PLAN)) < 1e-4
        assert len(fast._cache) <= HISTORY[extrapolate]
    assert 0 < errors["fitted"] < 0.9 * errors[0], errors
    every = EncoderPropagation(tuple(range(16)), extrapolate="fitted", samples=2).apply(plain, context)
    assert torch.equal(sampled(every, PLAN), expected)


def test_deep_cache_and_half_precision() -> None:
    plain = denoiser_of(unet())
    context, expected = context_of(PLAN, plain, 3.0), sampled(plain, PLAN)
    errors = {
        extrapolate: relative(
            sampled(DeepCache(keys=KEYS, extrapolate=extrapolate, samples=6).apply(plain, context), PLAN), expected
        )
        for extrapolate in (0, "chebyshev", "fitted")
    }
    assert 0 < errors["fitted"] < 0.9 * errors[0], errors
    way = DeepCache(keys="found", budget=5, extrapolate="fitted", samples=2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = sampled(way.apply(plain, context), PLAN)
    assert rough.dtype == torch.float32 and relative(rough, expected) < 1


def test_names_and_errors() -> None:
    assert format_spec(pick("accelerators", "deep_cache:extrapolate=fitted")) == "deep_cache:extrapolate=fitted"
    assert pick("accelerators", "encoder_propagation:extrapolate=1").extrapolate == 1
    with pytest.warns(DeprecationWarning, match="deep_cache: forecast= is now extrapolate="):
        old = pick("accelerators", "deep_cache:forecast=1")
    assert format_spec(old) == "deep_cache:extrapolate=1" and old == DeepCache(extrapolate=1)
    for wrong in (2, "fited", True, -1):
        with pytest.raises(BadInput, match=r"me: extrapolate is 0 .* fitted .*found"):
            resolve_extrapolate("me", wrong)
    plain = denoiser_of(unet())
    with pytest.raises(BadInput, match="needs calibration samples"):
        EncoderPropagation(KEYS, extrapolate="fitted").apply(plain, SamplingContext(context_of(PLAN).times))
    short = SamplingContext(context_of(PLAN).times, lambda n, seed: context_of(PLAN, plain).calls(n, seed)[:-1])  # type: ignore[misc]
    with pytest.raises(BadInput, match="took 15 model evaluations, expected 16"):
        DeepCache(keys=KEYS, extrapolate="fitted").apply(plain, short)
    assert torch.equal(
        angles((0.5,), VPCosine()),
        torch.atan2(VPCosine().sigma(torch.tensor([0.5], dtype=F64)), VPCosine().alpha(torch.tensor([0.5], dtype=F64))),
    )
