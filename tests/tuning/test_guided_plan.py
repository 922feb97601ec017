"""Plans fitted over both branches of guidance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hasten.denoiser import Wrapper
from hasten.errors import BadInput
from hasten.exact import m2
from hasten.guides import CFG, Rescale
from hasten.loading import load
from hasten.plan import guided_plan, plan
from hasten.samplers import Heun, UniPC
from hasten.sampling import Count, Noise
from hasten.schedules import VPLinear
from hasten.times import UniformLambda
from hasten.tuning import TuningTask
from hasten.tuning._rows import PlanParametrization, run_plan
from hasten.tuning._starts import resized
from hasten.tuning.guided_plan import GuidedPlan, intervals, uncond_placements
from hasten.workflows.tune import tune_model
from tests.factories import tiny_model

F64 = torch.float64


class Remembering(Wrapper):
    """Has a state from one evaluation to the next."""

    def reset(self) -> None: ...


@dataclass(frozen=True)
class Remembers:
    """An accelerator with such a state."""

    def apply(self, denoiser: Any, context: Any) -> Any:
        return Remembering(denoiser)


def task(denoiser: Any, steps: int, sampler: Any = None) -> TuningTask:
    times = UniformLambda(low=0.02)(denoiser.schedule, steps)
    return TuningTask(denoiser, sampler or UniPC(2), times, (2,), lambda n: torch.arange(n) % 3, n=96, seed=1000)


def test_it_ends_closer_to_the_guided_path_than_guidance_does() -> None:
    """Eight evaluations on a mixture, on other noises: at most half the error of UniPC under guidance with as many."""
    exact = m2(VPLinear(), labels=[0, 0, 1, 1, 2, 2])
    guided = CFG(2.0).wrap(exact)
    options = GuidedPlan(uncond=3, held_out=64, iterations=24, fine=48, batch=256, warm=1, search="sampler")
    tuned = options.tune(task(guided, 8))
    fitted, counted = tuned.plan, Count(exact)
    assert fitted is not None and fitted.nfe == 8 and 1 <= fitted.branches.count("uncond") <= 3
    x, label = Noise(range(128), (2,), F64).initial(), torch.arange(128) % 3
    fine = plan(UniPC(3), exact.schedule, UniformLambda(low=0.01)(exact.schedule, 96))(guided, x, label=label)
    result = fitted(CFG(2.0).wrap(counted), x, label=label)
    assert counted.rows == 8 * 128
    torch.testing.assert_close(result, run_plan(fitted, guided, x, label=label)[0][-1])
    plain = plan(UniPC(2), exact.schedule, UniformLambda(low=0.02)(exact.schedule, 4))(guided, x, label=label)
    after, before = ((end - fine).square().mean().sqrt() for end in (result, plain))
    assert after < before / 2, (float(after), float(before))
    assert tuned.figures["held_out_rms"] < tuned.figures["held_out_rms_of_sampler"] / 2
    assert tuned.figures["uncond"] == fitted.branches.count("uncond")


def test_a_parametrised_pair_begins_as_guidance() -> None:
    """The rows around a guided plan give its own result, and their free numbers move the branches apart."""
    exact = m2(VPLinear(), labels=[0, 0, 1, 1, 2, 2])
    guided, x, label = CFG(2.0).wrap(exact), Noise(range(8), (2,), F64).initial(), torch.arange(8) % 3
    table = guided_plan(plan(UniPC(2), exact.schedule, UniformLambda()(exact.schedule, 4)), 2.0, (0, 2))
    rows = PlanParametrization(table, teleport=False)
    same = rows.plan(rows.initial)
    assert same.branches == table.branches and same.guidance_scale == 2.0
    torch.testing.assert_close(same(guided, x, label=label), table(guided, x, label=label), rtol=1e-9, atol=1e-9)
    theta = rows.initial + 0.05
    states, _ = run_plan(rows.plan(theta), guided, x, label=label)
    torch.testing.assert_close(rows.plan(theta)(guided, x, label=label), states[-1])


def test_grids_of_another_length_keep_their_ends() -> None:
    schedule = VPLinear()
    for grid in (UniformLambda(low=0.02), UniformLambda(end=0.2)):
        times = grid(schedule, 8)
        for steps in (1, 3, 8, 12):
            new = resized(schedule, times, steps)
            assert len(new) == steps + 1 and new[0] == times[0] and new[-1] == times[-1]
            assert bool((new[1:] < new[:-1]).all())
        torch.testing.assert_close(resized(schedule, times, 8), times)


def test_every_place_is_another_step() -> None:
    for steps in range(1, 9):
        for asked in range(1, steps + 1):
            for places in uncond_placements(steps, asked):
                assert len(set(places)) == asked and min(places) >= 0 and max(places) < steps


def test_the_fit_starts_from_intervals_too() -> None:
    """Guidance in the steps of an interval, the conditional model in the others, with all evaluations used."""
    guided = CFG(2.0).wrap(m2(VPLinear(), labels=[0, 0, 1, 1, 2, 2]))
    asked = task(guided, 8)
    starts = dict(GuidedPlan(search="sampler", teleport=False).candidates(SimpleNamespace(low=0.02), asked))
    assert {table.nfe for table in starts.values()} == {8}
    x, label = Noise(range(6), (2,), F64).initial(), torch.arange(6) % 3
    steps = plan(UniPC(2), guided.schedule, resized(guided.schedule, asked.times, 6))
    start = next(table for name, table in starts.items() if name.endswith("interval 1,2"))
    ends = (0.5 * (steps.times[1:3] + steps.times[[0, 3]])).tolist()
    q = [float(guided.schedule.q(t)) for t in ends]
    inside = CFG(2.0, interval=(q[1], q[0])).wrap(guided.denoiser)
    torch.testing.assert_close(start(guided, x, label=label), steps(inside, x, label=label), rtol=1e-9, atol=1e-9)
    for count in range(1, 9):
        for evaluated in range(1, count + 1):
            found = intervals(count, evaluated)
            assert all(len(places) == evaluated and places[-1] < count for places in found)
            assert bool(found) == (evaluated < count)


def test_bad_input() -> None:
    exact = m2(VPLinear(), labels=[0, 0, 1, 1, 2, 2])
    small = {"held_out": 2, "fine": 8}
    for denoiser, options, sampler, words in (
        (exact, {}, None, "found no guidance"),
        (Rescale(0.5).wrap(CFG(2.0).wrap(exact)), {}, None, "rescale=0.5"),
        (CFG(2.0).wrap(exact), {"evaluations": 1}, None, "at least 2"),
        (CFG(2.0).wrap(exact), {"uncond": 0}, None, "at least 1"),
        (CFG(2.0).wrap(exact), {}, Heun(), "one evaluation a step"),
    ):
        with pytest.raises(BadInput, match=words):
            GuidedPlan(**small, **options).tune(task(denoiser, 4, sampler))


def test_the_command_and_what_samples_with_the_result(tmp_path: Path) -> None:
    """`hasten tune` saves it as the recommended plan; sampling takes it, at its own scale and without caches only."""
    model = tiny_model(steps=4)
    method = "guided_plan:held_out=2,fine=6,iterations=1,gradient=frozen,search=sampler,teleport=false,uncond=1"
    record = tune_model(model, tmp_path / "tuned", method, n=4, steps=4, guidance_scale=2.0)
    assert record["plan"] == "guided_plan-4-g2" and record["figures"]["uncond"] == 1
    loaded = load(tmp_path / "tuned")
    counted = 0

    def hook(_module: Any, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        counted += len(arguments[0])

    loaded.denoiser.net.register_forward_pre_hook(hook)
    images = loaded.sample(2)
    assert counted == 8 and bool(torch.isfinite(images).all())
    assert torch.equal(images, loaded.sample(2, plan="guided_plan-4-g2", guidance_scale=2.0))
    for options, words in (
        ({"guidance_scale": 3.0, "plan": "guided_plan-4-g2"}, "made for guidance_scale 2"),
        ({"guidance_scale": 1.0, "plan": "guided_plan-4-g2"}, "for guidance_scale 2"),
        ({"guides": ["dynamic_threshold"]}, "without further guides"),
        ({"accelerators": [Remembers()]}, "keep state from one evaluation to the next"),
    ):
        with pytest.raises(BadInput, match=words):
            loaded.sample(2, **options)


def test_a_pipeline_refuses_it() -> None:
    check = pytest.importorskip("hasten.adapters.diffusers.plans").check_plan
    table = guided_plan(plan(UniPC(2), VPLinear(), UniformLambda()(VPLinear(), 3)), 2.0)
    with pytest.raises(BadInput, match="both of them in every step"):
        check(table)
