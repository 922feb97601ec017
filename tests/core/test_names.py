"""Names: of diffusers and k-diffusion, of classes of one's own, and numbers that no method takes."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import BadInput
from hasten.pick import _class, format_spec, method_names, pick
from hasten.plan import Plan, plan
from hasten.predictions import V, prediction_from
from hasten.samplers import DDIM, DDPM, DEIS, PLMS, Consistency, DPMSolver, Preconditioned
from hasten.schedules import EDM, Flow, Schedule, VPLinear, schedule_from_dict
from hasten.times import Karras, Trailing, UniformLambda, UniformTime


@pytest.mark.parametrize(
    "name, means",
    [
        ("euler", DDIM()),
        ("Euler a", DDIM(eta=1.0)),
        ("euler_ancestral", DDIM(eta=1.0)),
        ("dpmpp_2m", DPMSolver()),
        ("DPM++ 2M SDE", DPMSolver(sde=True)),
        ("dpmpp_3m_sde", DPMSolver(3, sde=True)),
        ("pndm", PLMS()),
        ("dpm_solver", DPMSolver(predict="eps")),
        ("dpm-solver++", DPMSolver()),
        ("lcm", Consistency()),
        ("lms", DEIS(4, "rho", False)),
        ("dpmpp_2m:order=3", DPMSolver(3)),
    ],
)
def test_samplers_that_others_call_differently(name: str, means: Any) -> None:
    assert pick("samplers", name) == means


def test_grids_that_others_call_differently() -> None:
    for name, means in (
        ("linspace", UniformTime()),
        ("trailing", Trailing()),
        ("karras", Karras()),
        ("exponential", UniformLambda()),
    ):
        assert pick("times", name) == means
    for folder, name, near in (("times", "leading", "trailing"), ("samplers", "dpmpp_sde", "dpm:sde=true")):
        with pytest.raises(BadInput, match=near):
            pick(folder, name)


def test_euler_is_ddim_and_ancestral_euler_is_ddim_with_noise() -> None:
    """y' = y + (q' - q) (y - x0) / q; ancestral: sigma_up^2 = q'^2 (q^2 - q'^2) / q^2, sigma_down^2 + sigma_up^2 = q'^2."""
    times = UniformTime()(EDM(), 4)
    q = EDM().sigma(times)
    euler, ancestral = (plan(pick("samplers", name), EDM(), times) for name in ("euler", "euler_a"))
    up = (q[1:] ** 2 * (q[:-1] ** 2 - q[1:] ** 2) / q[:-1] ** 2).sqrt()
    down = (q[1:] ** 2 - up**2).sqrt()
    assert torch.allclose(euler.a, q[1:] / q[:-1]) and torch.allclose(euler.B.diagonal(), 1 - q[1:] / q[:-1])
    assert torch.allclose(ancestral.a, down / q[:-1]) and torch.allclose(ancestral.C.diagonal(), up[:3])


def test_predictions_of_diffusers() -> None:
    for name, means in (("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0"), ("flow_prediction", "flow")):
        assert prediction_from(name) == prediction_from(means)
    with pytest.raises(BadInput, match="did you mean 'eps'"):
        prediction_from("epss")


@dataclass(frozen=True)
class Flow2(VPLinear):
    """A schedule of one's own, two classes below Schedule."""

    extra: tuple[float, ...] = (1.0, 2.0)


def hijack() -> type:
    @dataclass(frozen=True)
    class Mine(Schedule):
        def _alpha(self, t: Tensor) -> Tensor:
            return 1 - t

        def _sigma(self, t: Tensor) -> Tensor:
            return t

        def _time(self, lam: Tensor) -> Tensor:
            return torch.sigmoid(-lam)

    Mine.__name__ = "Flow"
    return Mine


def test_schedules_of_ones_own_survive_a_file_and_take_no_names() -> None:
    own = Flow2()
    made = plan(DDIM(), own, UniformTime()(own, 3))
    again = Plan.from_json(made.to_json())
    assert schedule_from_dict(again.schedule) == own and again.schedule["name"].endswith("test_names.Flow2")
    again.check_schedule(own)
    mine = hijack()
    assert type(schedule_from_dict({"name": "Flow"})) is Flow
    assert type(schedule_from_dict(mine().to_dict())) is mine
    # a plan of a schedule that this process does not know still runs
    told = made.to_json().replace("test_names.Flow2", "test_names.Gone")
    there = Plan.from_json(told)
    x = torch.ones(1, 2)
    assert torch.equal(there(lambda x_t, t: x_t * 0.5, x), made(lambda x_t, t: x_t * 0.5, x))
    with pytest.raises(BadInput, match="import the module"):
        there(hasten.exact.m2(own), x)


def test_predictions_of_ones_own_take_no_names() -> None:
    @dataclass(frozen=True)
    class Scaled(V):
        scale: float = 2.0

    @dataclass(frozen=True)
    class Other(V):
        name: ClassVar[str] = "eps"

    assert type(prediction_from("v")) is V and type(prediction_from("eps")).__name__ == "Eps"
    for own in (Scaled(3.0), Other()):
        assert prediction_from(own.to_dict()) == own


def test_samplers_of_ones_own_are_spelled_by_where_they_are() -> None:
    class Mine(DDIM):
        pass

    class DDPM2(DDPM):
        pass

    assert format_spec(Mine(eta=0.5)).endswith("Mine:eta=0.5") and "." in format_spec(Mine())
    assert format_spec(Mine()) != format_spec(DDPM2()) and format_spec(DDPM()) == "ddpm"


def numeric(cls: type) -> list[str]:
    hints = typing.get_type_hints(cls)
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and not f.metadata.get("bound")
        and any(kind in str(hints[f.name]) for kind in ("float", "int"))
        and "Literal" not in str(hints[f.name])
    ]


MAY = {"clip", "kappa", "churn_max", "high"}
OWN = [
    (folder, name, field)
    for folder in ("samplers", "times", "guides", "starts", "tuning")
    for name in method_names(folder)
    for field in numeric(_class(folder, name))
]


@pytest.mark.parametrize("folder, name, field", OWN, ids=lambda v: v)
def test_no_method_takes_what_is_no_number(folder: str, name: str, field: str) -> None:
    cls = _class(folder, name)
    pair = "tuple" in str(typing.get_type_hints(cls)[field])
    for value in (math.nan, math.inf, -math.inf):
        if value == math.inf and field in MAY:
            continue
        with pytest.raises(BadInput):
            cls(**{field: (value, value) if pair else value})
    if field != "scale" and not pair:
        with pytest.raises(BadInput):
            cls(**{field: -1})


@pytest.mark.parametrize("folder", ["samplers", "times", "accelerators", "distillers", "tuning"])
def test_no_option_on_the_command_line_is_nan(folder: str) -> None:
    for name in method_names(folder):
        cls = _class(folder, name)
        for field in numeric(cls):
            if "float" in str(typing.get_type_hints(cls)[field]) and "tuple" not in str(
                typing.get_type_hints(cls)[field]
            ):
                with pytest.raises(BadInput):
                    pick(folder, f"{name}:{field}=nan")


def test_infinite_where_it_means_something() -> None:
    assert Preconditioned(kappa=math.inf).kappa == math.inf and UniformLambda(clip=math.inf).clip == math.inf
    assert pick("samplers", "heun:churn=0.1,churn_max=inf").churn_max == math.inf
