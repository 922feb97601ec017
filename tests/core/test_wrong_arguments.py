"""Arguments of the wrong kind are refused in a line, or understood, by every function of the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten import Denoiser, Discrete, Flow, Karras, Noise, UniPC, VPLinear, draw, pick, plan, walk
from hasten.errors import BadInput, NonFinite
from hasten.model import Model


class Net(torch.nn.Module):
    def __init__(self, scale: float = 0.3) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: Any = None) -> torch.Tensor:
        return x * self.scale


DENOISER = Denoiser(Net(), VPLinear(), "v")
TIMES = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)


def drawn(**changes: Any) -> torch.Tensor:
    asked = {"denoiser": DENOISER, "sampler": UniPC(2), "times": TIMES, "noise": Noise(range(3), (2,)), **changes}
    return draw(**asked)


def walked(**changes: Any) -> torch.Tensor:
    return walk(**{"denoiser": DENOISER, "sampler": UniPC(2), "times": TIMES, "x": torch.ones(3, 2), **changes})


def compiled(**changes: Any) -> Any:
    return plan(**{"sampler": UniPC(2), "schedule": VPLinear(), "times": TIMES, **changes})


@pytest.mark.parametrize("call", [drawn, walked, compiled])
@pytest.mark.parametrize(
    "wrong",
    [
        {"sampler": UniPC},
        {"sampler": 5},
        {"sampler": Karras()},
        {"sampler": "nosuch"},
        {"times": Karras},
        {"times": 5},
        {"times": ["a"]},
        {"times": [0.0, 1.0]},
    ],
    ids=str,
)
def test_a_wrong_sampler_or_time(call: Callable[..., Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        call(**wrong)


@pytest.mark.parametrize("call", [drawn, walked])
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": 5},
        {"x": np.zeros((3, 2))},
        {"x": torch.zeros(3, 2, dtype=torch.int64)},
        {"progress": 5},
        {"callback": "x"},
        {"cond": {1: 2}},
        {"cond": {"nope": torch.ones(3)}},
        {"cond": {"x_t": 1}},
        {"Label": torch.ones(3)},
    ],
    ids=str,
)
def test_a_wrong_state_function_or_condition(call: Callable[..., Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        call(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": None},
        {"noise": torch.ones(3, 2)},
        {"plan": "fitted"},
        {"x": torch.ones(2, 2)},
        {"x": torch.ones(3, 5)},
    ],
    ids=str,
)
def test_a_wrong_noise_or_plan(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        drawn(**wrong)


def test_names_and_lists_are_understood() -> None:
    assert torch.equal(drawn(sampler="unipc", times=[1.0, 0.5, 0.0]), drawn())
    assert torch.equal(drawn(times=np.array([1.0, 0.5, 0.0])), drawn())
    assert torch.equal(drawn(times="karras", steps=3), drawn(times=Karras(), steps=3))
    assert compiled(sampler="unipc").nfe == 2
    model = Model(DENOISER, "points", (2,))
    assert torch.equal(model.sample(2, times=[1.0, 0.5, 0.0]), model.sample(2, times=TIMES))
    assert model.setting(times=np.array([1.0, 0.0]))["times"] == (1.0, 0.0)


def test_samples_that_are_not_finite_are_an_error_that_says_where() -> None:
    broken = Denoiser(Net(float("nan")), VPLinear(), "v")
    with pytest.raises(NonFinite, match="weight scale"):
        drawn(denoiser=broken)
    with pytest.raises(NonFinite, match="weight scale"):
        compiled()(broken, torch.ones(3, 2))
    with pytest.raises(NonFinite, match="begins from"):
        drawn(x=torch.full((3, 2), float("nan")))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Denoiser(None, VPLinear(), "v"),
        lambda: Denoiser(Net, VPLinear(), "v"),
        lambda: Denoiser(Net(), VPLinear, "v"),
        lambda: Denoiser(Net(), VPLinear(), "v", clock=None),
        lambda: Denoiser(Net(), VPLinear(), "v", guidance_range=(1,)),
        lambda: Denoiser(Net(), VPLinear(), "v", guidance_range=(3, 1)),
        lambda: Denoiser(Net(), VPLinear(), "v", null_label=-1),
        lambda: Denoiser(Net(), VPLinear(), {"name": "edm", "sigma_data": "a"}),
        lambda: DENOISER(np.ones((3, 2)), 0.5),
        lambda: DENOISER(torch.ones(3, 2), None),
        lambda: DENOISER(torch.ones(3, 2), "a"),
        lambda: VPLinear(beta_max=float("inf")),
        lambda: VPLinear(beta_min="a"),
        lambda: Flow(shift=float("inf")),
        lambda: Flow(shift="3"),
        lambda: hasten.EDM(sigma_max=float("inf")),
        lambda: hasten.VE(sigma_max=float("inf")),
        lambda: Discrete(None),
        lambda: Discrete((0.9, "a")),
        lambda: Discrete.linear(1.5),
        lambda: Discrete.from_betas(5),
        lambda: Discrete.from_betas([0.1, -0.1]),
        lambda: hasten.rescale_zero_snr(VPLinear()),
        lambda: Noise([0], 5),
        lambda: Noise([0], (-1,)),
        lambda: Noise([0], (1.5,)),
        lambda: Noise([0], (2,), torch.int64),
    ],
)
def test_wrong_parts(make: Callable[[], Any]) -> None:
    with pytest.raises(BadInput) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_plain_in_a_schedule() -> None:
    made = compiled(schedule=VPLinear(beta_max=np.float32(3)))
    assert '"beta_max": 3.0' in made.to_json()


@pytest.mark.parametrize("t", [np.array([0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]])
def test_times_of_a_denoiser_may_be_lists(t: Any) -> None:
    x = torch.ones(3, 2)
    assert torch.equal(DENOISER(x, t), DENOISER(x, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 10**9},
        {"n": 10**30},
        {"plan": {}},
        {"precision": torch.float16},
        {"progress": 5},
        {"callback": "x"},
        {"accelerators": [5]},
        {"guides": [5]},
        {"guidance_scale": "2"},
        {"guidance_scale": True},
        {"guidance_scale": torch.tensor([1.0, 2.0])},
        {"sampler": "nosuch"},
    ],
    ids=str,
)
def test_a_wrong_argument_of_sample(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong)).rstrip("s")):
        Model(DENOISER, "points", (2,)).sample(**{"n": 1, "steps": 1, **wrong})


def test_one_guide_by_itself_none_and_numbers_of_numpy() -> None:
    model = Model(DENOISER, "points", (2,))
    plainly = model.sample(2, steps=2)
    for same in (
        {"guides": None},
        {"accelerators": None},
        {"guidance_scale": np.float32(1)},
        {"guidance_scale": torch.tensor(1)},
    ):
        assert torch.equal(model.sample(2, steps=2, **same), plainly)
    with pytest.raises(BadInput, match="guide 'nosuch'"):
        model.sample(1, guides="nosuch")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DDIM", "ddim"),
        ("UniPC", "unipc"),
        ("DDIMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "ddim"),
        ("EulerAncestralDiscreteScheduler", "ddim:eta=1"),
        ("DPMSolverMultistepScheduler", "dpm"),
        ("sample_euler", "ddim"),
        ("k_euler", "ddim"),
        ("UniPCMultistepScheduler", "unipc"),
        ("HeunDiscreteScheduler", "heun"),
        ("LMSDiscreteScheduler", "lms"),
        ("LCMScheduler", "consistency"),
        ("FlowMatchEulerDiscreteScheduler", "ddim"),
    ],
)
def test_classes_of_diffusers_and_functions_of_k_diffusion(name: str, meant: str) -> None:
    assert pick("samplers", name) == pick("samplers", meant)


def test_a_sampler_with_the_grid_in_its_name_gets_the_hint() -> None:
    with pytest.raises(BadInput, match="sampler dpm with times karras"):
        pick("samplers", "dpmpp_2m_karras")


def test_samples_that_are_no_images_are_not_clamped() -> None:
    for shape in ((2,), (5, 4, 4), (3, 2, 4, 4)):
        wide = Model(Denoiser(Net(9.0), VPLinear(), "x0"), "wide", shape)
        assert wide.codec == "raw" and float(wide.sample(2, steps=2).abs().max()) > 2
