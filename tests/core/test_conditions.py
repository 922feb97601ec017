"""Options and conditions do not mix; methods are given by name or as objects; a callback sees every evaluation."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import m2
from hasten.plan import Plan, plan
from hasten.plan.draw import draw
from hasten.samplers import DDIM, AdaptiveSDE, Heun, Picard, PredictorCorrector, ProbabilityFlow, UniPC
from hasten.sampling import Noise, Query, walk
from hasten.schedules import Discrete, Flow, VPCosine, VPLinear
from hasten.times import Explicit, Karras, UniformLambda, UniformTime

S = (1, 4, 4)


class Net(nn.Module):
    """Takes anything, and says what it was given."""

    def forward(self, noisy: Tensor, time: Tensor, **cond: Any) -> Tensor:
        self.given = cond
        return torch.tanh(noisy)


class Named(nn.Module):
    def forward(self, x: Tensor, time: Tensor, style: float = 0.0) -> Tensor:
        self.given = {"style": style}
        return torch.tanh(x)


def ways(denoiser: Any) -> dict[str, Any]:
    times = UniformTime()(denoiser.schedule, 3)
    noise = Noise([0], S)
    compiled = plan(DDIM(), denoiser.schedule, times)
    return {
        "draw": lambda **k: draw(denoiser, DDIM(), UniformTime(), noise, steps=3, **k),
        "walk": lambda **k: walk(DDIM(), denoiser, noise.initial(), times, **k),
        "plan": lambda **k: compiled(denoiser, noise.initial(), **k),
    }


@pytest.mark.parametrize("way", ["draw", "walk", "plan"])
@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"step": 8}, "no option"),
        ({"guidance_scale": 3.0}, "guidance_scale"),
        ({"eta": 0.5}, "eta"),
        ({"progres": print}, "'progress'"),
        ({"seed": 1}, "seed"),
        ({"callbak": print}, "callback"),
        ({"cfg": True}, "cfg"),
        ({"cond": [1]}, "dict"),
        ({"cond": {"t": 1}}, "'t'"),
        ({"foo": 3}, "foo=3"),
    ],
)
def test_a_mistyped_option_is_refused(way: str, wrong: dict[str, Any], says: str) -> None:
    net = Net()
    with pytest.raises(BadInput, match=says) as e:
        ways(Denoiser(net, VPLinear(), "v"))[way](**wrong)
    assert "\n" not in str(e.value) and not hasattr(net, "given")


@pytest.mark.parametrize("way", ["draw", "walk", "plan"])
def test_conditions_reach_the_network_under_any_name(way: str) -> None:
    net = Net()
    cond = {"noise": torch.ones(1), "steps": torch.ones(1), "x": 3, "plan": "a", "label": torch.ones(1)}
    ways(Denoiser(net, VPLinear(), "v"))[way](cond=cond)
    assert net.given.keys() == cond.keys() and net.given["x"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ways(Denoiser(net, VPLinear(), "v"))[way](label=torch.ones(1))
        named = Named()
        ways(Denoiser(named, VPLinear(), "v"))[way](style=2.0)  # which the network names itself
        assert named.given == {"style": 2.0}
    with pytest.warns(DeprecationWarning, match="cond="):
        ways(Denoiser(net, VPLinear(), "v"))[way](caption=torch.ones(1))
    assert list(net.given) == ["caption"]
    with pytest.raises(BadInput, match="twice"):
        ways(Denoiser(net, VPLinear(), "v"))[way](cond={"label": torch.ones(1)}, label=torch.ones(1))


def test_steps_that_the_times_do_not_have_are_refused() -> None:
    times, noise = UniformTime()(VPLinear(), 8), Noise([0], (2,))
    with pytest.raises(BadInput, match="8 steps, asked for 50"):
        draw(m2(VPLinear()), DDIM(), times, noise, steps=50)
    with pytest.raises(BadInput, match="8 network evaluations, asked for 9"):
        draw(m2(VPLinear()), None, times, noise, steps=9, plan=plan(DDIM(), VPLinear(), times))
    draw(m2(VPLinear()), DDIM(), times, noise, steps=8)


def test_a_plan_refuses_another_schedule() -> None:
    times = UniformLambda()(VPLinear(), 6)
    made = plan(UniPC(3), VPLinear(), times)
    for compiled in (made, Plan.from_json(made.to_json())):
        noise = Noise([0], (2,))
        x = noise.initial()
        for schedule in (Flow(), VPCosine(), Discrete.linear(), VPLinear(beta_max=19.0)):
            with pytest.raises(BadInput, match="the plan was made for VPLinear"):
                draw(m2(schedule), None, None, noise, plan=compiled)
            with pytest.raises(BadInput, match="the plan was made for VPLinear"):
                compiled(m2(schedule), x)
        same = compiled(m2(VPLinear()), x)
        assert torch.equal(draw(m2(VPLinear()), None, None, noise, plan=compiled, x=x), same)
        assert torch.equal(compiled(lambda x_t, t: m2(VPLinear())(x_t, t), x), same)  # a function has no schedule
    table = Discrete.scaled_linear()
    in_float32 = Discrete(tuple(torch.tensor(table.alphas_cumprod, dtype=torch.float32).double().tolist()))
    plan(UniPC(2), table, UniformTime()(table, 4))(m2(in_float32), x)  # the same but for rounding


def test_a_model_refuses_a_plan_of_another_schedule(tmp_path: Any) -> None:
    model = hasten.load("fashion")
    other = plan(UniPC(3), Flow(), UniformLambda()(Flow(), 8))
    (tmp_path / "plan.json").write_text(other.to_json())
    for given in (other, str(tmp_path / "plan.json")):
        with pytest.raises(BadInput, match="the plan was made for Flow"):
            model.sample(1, plan=given)


def test_methods_as_objects() -> None:
    model = hasten.load("fashion")
    by_name = model.sample(2, sampler="dpm:order=3", times="karras:rho=5", steps=3, guidance_scale=1.0)
    made = {"sampler": hasten.DPMSolver(3), "times": Karras(rho=5.0), "guidance_scale": 1.0}
    assert torch.equal(model.sample(2, steps=3, **made), by_name)
    times = Karras(rho=5.0)(model.denoiser.schedule, 3)
    for given in (times, Explicit(tuple(times.tolist()))):
        assert torch.equal(model.sample(2, **{**made, "times": given}), by_name)
    setting = model.setting(sampler=hasten.DPMSolver(3), times=Karras(rho=5.0), steps=3)
    assert setting["sampler"] == "dpm:order=3" and setting["times"] == "karras:rho=5"
    for wrong, says in (
        ({"times": Karras}, r"Karras\(\)"),
        ({"times": 3}, "grid"),
        ({"sampler": hasten.UniPC}, r"UniPC\(\)"),
        ({"sampler": 3}, "sampler must be"),
        ({"times": times, "steps": 9}, "3 steps, asked for 9"),
    ):
        with pytest.raises(BadInput, match=says):
            model.sample(1, **wrong)


def test_tuning_takes_methods_as_objects_and_leaves_the_model_alone(tmp_path: Any, monkeypatch: Any) -> None:
    model = hasten.load("fashion")
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(model).items()}
    before.pop("_accelerated")
    made = hasten.tune_model(
        model, tmp_path / "tuned", "optimized_steps", sampler=UniPC(2), times=UniformLambda(), steps=4, guidance_scale=3
    )
    assert made["plan"] and hasten.load(tmp_path / "tuned").plan is not None
    monkeypatch.setattr(hasten.Model, "save", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hasten.tune_model(model, tmp_path / "other", "optimized_steps", sampler="unipc", steps=4)
    for key, value in before.items():
        assert getattr(model, key) is value or getattr(model, key) == value, key


@pytest.mark.parametrize(
    "sampler", [DDIM(), Heun(), PredictorCorrector(), AdaptiveSDE(), ProbabilityFlow(1e-2, 1e-2), Picard()], ids=str
)
def test_the_callback_sees_every_evaluation(sampler: Any) -> None:
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    exact = m2(VPLinear())
    noise = Noise([0, 1], (2,))

    def callback(step: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
        seen.append((step, float(t.max()), x, x0))
        assert torch.allclose(x0, exact(x, t), atol=1e-5)

    counted = hasten.sampling.Count(exact)
    result = draw(counted, sampler, UniformLambda(), noise, steps=4, callback=callback)
    assert [step for step, *_ in seen] == list(range(counted.calls)) and len(result) == 2
    assert seen[0][1] == pytest.approx(1.0) and torch.equal(seen[-1][3].to(result), result) or len(seen) > 4


def test_the_callback_of_a_model() -> None:
    steps: list[int] = []
    hasten.load("fashion").sample(
        3, steps=2, sampler="ddim", batch_size=2, callback=lambda step, t, x, x0: steps.append((step, len(x0)))
    )
    assert steps == [(0, 2), (1, 2), (0, 1), (1, 1)]


def test_the_callable_modules_say_what_they_take() -> None:
    for module, function in ((hasten.plan, hasten.plan.plan), (hasten.pick, hasten.pick.pick)):
        assert inspect.signature(module) == inspect.signature(function)
        assert pickle.loads(pickle.dumps(module)) is module and copy.deepcopy(module) is module


def test_everything_public_is_at_the_root() -> None:
    for name in ("BadInput", "Wrapper", "Sampler", "invert", "Karras", "UniformLambda", "Trailing", "Explicit"):
        assert name in hasten.__all__ and getattr(hasten, name).__name__ == name


def test_a_sampler_that_is_not_frozen_works() -> None:
    @dataclass
    class Mine:
        linear: bool = True
        order: int = 1

        def nfe(self, steps: int) -> int:
            return steps

        def steps(self, schedule: Any, x: Any, times: Tensor, noise: Any) -> Generator[Query, Any, Any]:
            return (yield from DDIM().steps(schedule, x, times, noise))

    noise = Noise([0], (2,))
    one, two = (draw(m2(VPLinear()), s, UniformLambda(), noise, steps=4) for s in (Mine(), DDIM()))
    assert torch.equal(one, two)


def test_results_have_the_dtype_of_the_start() -> None:
    class Double(nn.Module):
        schedule = VPLinear()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x.double() * 0.5

    for sampler in (DDIM(), UniPC(2), Heun(), hasten.DDPM(), PredictorCorrector()):
        made = draw(Double(), sampler, UniformLambda(), Noise([0], (2,), torch.float64), steps=4, x=torch.ones(1, 2))
        assert made.dtype == torch.float32
