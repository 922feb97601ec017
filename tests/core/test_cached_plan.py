"""Output-level caches are linear multistep plans: traced, equal to the running cache, saved, and tuned by count."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hasten
from hasten.accelerators.output_cache import OutputCache, OutputCached
from hasten.errors import BadInput
from hasten.exact import m2
from hasten.pick import pick
from hasten.plan import Plan, plan
from hasten.plan.cached import cached_plan
from hasten.predictions import prediction_from
from hasten.samplers import DDIM, Preconditioned
from hasten.sampling import Count, Noise
from hasten.schedules import VPCosine
from hasten.times import UniformLambda
from hasten.tuning import TuningTask
from hasten.tuning.cached_plan import CachedPlan
from hasten.utils.random import no_noise
from tests.samplers.problems import LINEAR, label

SCHEDULE = VPCosine()
EULER: Any = DDIM()
TIMES = UniformLambda()(SCHEDULE, 14)
NOISE = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REUSE = {"teacache": "output", "easycache": "difference"}


class Double(torch.nn.Module):
    """x0 = 2 x, whatever the conditions are."""

    schedule = SCHEDULE

    def forward(self, x: torch.Tensor, t: Any, **cond: Any) -> torch.Tensor:
        return 2 * x


def running(full: Plan, rule: str, prediction: str, threshold: float = 0.4, warmup: int = 2) -> OutputCached:
    """A cache around an exact denoiser, for the evaluations of this plan."""
    return OutputCached(m2(SCHEDULE), OutputCache(threshold, rule, warmup), full.nfe, prediction_from(prediction))


@pytest.mark.parametrize(
    ("sampler", "prediction", "rule"),
    [
        ("ddim", "eps", "teacache"),
        ("ddim", "flow", "easycache"),
        ("unipc:order=3", "v", "easycache"),
        ("unipc:order=3", "x0", "teacache"),
        ("dpm:order=2,predict=eps", "v", "teacache"),
        ("heun", "edm", "easycache"),
    ],
)
def test_the_plan_is_the_running_cache(sampler: str, prediction: str, rule: str) -> None:
    """To 1e-12 in float64, with as many evaluations as the cache computes."""
    full = plan(pick("samplers", sampler), SCHEDULE, UniformLambda(start=0.98)(SCHEDULE, 14))
    cache = running(full, rule, prediction)
    x = NOISE * float(SCHEDULE.prior_std(full.times[0]))
    expected = full(cache, x)
    assert 3 <= len(cache.computed) < full.nfe, cache.computed
    traced = cached_plan(full, cache.computed, prediction, REUSE[rule])
    counted = Count(m2(SCHEDULE))
    result = traced(counted, x)
    assert traced.nfe == counted.calls == len(cache.computed)
    assert float((result - expected).abs().max()) < 1e-12 * max(1.0, float(expected.abs().max()))
    assert float((full(m2(SCHEDULE), x) - expected).abs().max()) > 1e-4  # the cache does something
    again = Plan.from_json(traced.to_json())
    assert torch.equal(again(m2(SCHEDULE), x), result)


@pytest.mark.parametrize("sampler", LINEAR, ids=label)
def test_with_every_evaluation_computed_it_is_the_plan_itself(sampler: Any) -> None:
    """Every linear sampler of the library: replayed from its table, draws of noise included."""
    full = plan(sampler, SCHEDULE, UniformLambda(start=0.98)(SCHEDULE, 6))
    if full.basis is not None:
        pytest.skip("in a basis")
    again = cached_plan(full, range(full.nfe), "v")
    x = NOISE * float(SCHEDULE.prior_std(full.times[0]))

    def noise() -> Any:
        return Noise(range(8), (2,), torch.float64) if full.stochastic else no_noise

    torch.testing.assert_close(again(m2(SCHEDULE), x, noise()), full(m2(SCHEDULE), x, noise()), rtol=1e-9, atol=1e-9)


def test_reuse_of_the_last_x0_in_ddim_is_one_longer_step() -> None:
    """DDIM with a constant x0 is exact, so that steps with the same x0 join into one."""
    full = plan(EULER, SCHEDULE, TIMES)
    joined = plan(EULER, SCHEDULE, TIMES[[0, 3, 4, 9, 14]])
    traced = cached_plan(full, (0, 3, 4, 9), "x0")
    for name in ("times", "a", "A", "B", "C"):
        torch.testing.assert_close(getattr(traced, name), getattr(joined, name), rtol=1e-10, atol=1e-12)


def test_a_cache_of_a_model_and_its_plan() -> None:
    """On the bundled network, through the accelerator of the command line; eight steps, no tuning."""
    model = hasten.load("fashion")
    info: dict[str, Any] = {"n": 2, "sampler": "ddim", "times": "trailing", "steps": 9, "guidance_scale": 1.0}
    resolved = model.resolve(**{k: v for k, v in info.items() if k != "n"}, accelerators=["output_cache:threshold=.3"])
    cache = next(m for m in resolved.denoiser.modules() if isinstance(m, OutputCached))
    images = model.sample(**info, accelerators=["output_cache:threshold=.3"])
    assert resolved.plan is not None
    noise = Noise(range(2), model.shape)
    full = resolved.plan(cache, noise.initial(), cond={"label": model.labels(2)})
    traced = cached_plan(resolved.plan, cache.computed, model.denoiser.prediction, "difference")
    assert traced.nfe == len(cache.computed) < 9
    result = traced(model.denoiser, noise.initial(), cond={"label": model.labels(2)})
    torch.testing.assert_close(result, full, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(images, full.clamp(-1, 1) if images.abs().max() <= 1 else full, rtol=1e-3, atol=1e-2)


def test_decisions() -> None:
    """Threshold 0 computes all; a large one the warm-up and the last; a change of conditions is computed."""
    full = plan(EULER, SCHEDULE, TIMES)
    for rule in REUSE:
        for threshold, expected in ((0.0, list(range(14))), (1e6, [0, 1, 2, 13])):
            cache = running(full, rule, "v", threshold, warmup=3)
            full(cache, NOISE)
            assert cache.computed == expected, rule
    cache = OutputCached(Double(), OutputCache(1e6, "teacache", 1), None, prediction_from("v"))
    for k, rows in enumerate((8, 8, 4, 4)):
        cache(NOISE[:rows], TIMES[k])
    assert cache.computed == [0, 2]
    cache.reset()
    for k, value in enumerate((0, 0, 1, 1)):
        cache(NOISE, TIMES[k], label=torch.tensor([value]))
    assert cache.computed == [0, 2]


def test_easycache_by_hand() -> None:
    """x0 = 2 x: in terms of x0 the ratio r is 2, and d_k = |z_k - z_{k-1}| / |z_j|."""
    z = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]  # from 1.1: .091, .182 >= .15, then .077, .154, then ...
    cache = OutputCached(Double(), OutputCache(0.15), None, prediction_from("x0"))
    results = [float(cache(torch.tensor([[v]], dtype=torch.float64), 0.5)) for v in z]
    assert cache.computed == [0, 1, 3, 5]
    assert results == pytest.approx([2.0, 2.2, 2.2 + 0.1, 2.6, 2.6 + 0.1, 3.0, 3.0 + 0.1])


def test_tuned_by_count() -> None:
    """`hasten tune --method cached_plan:nfe=...`: the count is met, the figures say how."""
    model = m2(SCHEDULE)
    task = TuningTask(model, DDIM(), UniformLambda()(SCHEDULE, 30), (2,), n=32)
    for rule in REUSE:
        for count in (4, 7):
            tuned = pick("tuning", f"cached_plan:rule={rule},nfe={count},prediction=v").tune(task)
            assert tuned.plan is not None and tuned.plan.nfe == count
            computed = [int(k) for k in tuned.figures["computed"].split(",")]
            assert len(computed) == count and computed[-1] == 29 and tuned.figures["of"] == 30
            assert 0 < tuned.figures["rms_to_sampler"] < 1
    with pytest.raises(BadInput, match="no threshold of easycache leads to 2 of 30 evaluations; nearest are 3"):
        CachedPlan(nfe=2, prediction="v").tune(task)
    with pytest.raises(BadInput, match="has no prediction: name what is reused"):
        CachedPlan().tune(task)


def test_what_cannot_be_is_refused() -> None:
    full = plan(EULER, SCHEDULE, TIMES)
    with pytest.raises(BadInput, match="numbers from 0, which must be one, to 13"):
        cached_plan(full, (1, 2), "v")
    asked = dataclasses.replace(full, branches=("cond", "uncond") * 7, guidance_scale=2.0)
    with pytest.raises(BadInput, match="not of one branch each"):
        cached_plan(asked, (0, 2), "v")
    with pytest.raises(BadInput, match="did you mean 'output'"):
        cached_plan(full, (0, 2), "v", "outputs")
    for options, message in (
        ("rule=easycach", "did you mean 'easycache'"),
        ("threshold=-1", "threshold is 0 or more"),
        ("warmup=1", "warmup of easycache is 2 or more"),
    ):
        with pytest.raises(BadInput, match=message):
            pick("accelerators", f"output_cache:{options}")
    with pytest.raises(BadInput, match="works on a hasten.Denoiser, found GaussianMixture"):
        OutputCache().apply(m2(SCHEDULE), hasten.accelerators.SamplingContext())
    mean, covariance = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    sampler: Any = Preconditioned(moments="full").bind({"mean": mean, "covariance": covariance}, {})
    with pytest.raises(BadInput, match="without a basis"):
        cached_plan(plan(sampler, SCHEDULE, TIMES), (0, 1), "v")


@pytest.mark.parametrize("rule", ["easycache", "teacache"])
@torch.no_grad()
def test_in_a_pipeline(rule: str) -> None:
    """A DiT with a learned variance: at reused evaluations the network's last output, moved by its input's change."""
    pytest.importorskip("diffusers")
    from hasten.adapters.diffusers import accelerate_pipeline
    from tests.adapters import tiny

    pipe, label = tiny.dit_pipeline(), torch.tensor([1, 1000])
    fast: Any = accelerate_pipeline(pipe, f"output_cache:threshold=1000,rule={rule}", steps=10)
    fast.scheduler.set_timesteps(10)
    xs = torch.randn(10, 2, pipe.transformer.config.in_channels, 8, 8)
    for k, t in enumerate(fast.scheduler.timesteps):
        arguments: dict[str, Any] = {"timestep": t.expand(2), "class_labels": label, "return_dict": False}
        output, plain = fast.transformer(xs[k], **arguments)[0], pipe.transformer(xs[k], **arguments)[0]
        if k in (0, 1, 9):
            saved = plain.clone()
            assert torch.equal(output, plain), k
            continue
        expected = saved.clone()
        if rule == "easycache":
            expected[:, : xs.shape[2]] += xs[k] - xs[1]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert float((output - plain).abs().max()) > 1e-3
