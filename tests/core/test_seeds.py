"""Seeds: image k is of `seed + k`, all of 64 bits count, and nobody else's random numbers are touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import m2
from hasten.nets.unet import UNet
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.samplers import DDIM, DDPM, PredictorCorrector, UniPC
from hasten.sampling import Noise
from hasten.schedules import VPCosine, VPLinear
from hasten.times import UniformLambda
from hasten.tuning import TuningTask
from hasten.utils.random import global_seed, make_generator
from hasten.workflows.train import train_model


def test_seeds_of_32_bits_are_those_of_torch() -> None:
    for seed in (0, 7, 2**32 - 1):
        g = torch.Generator().manual_seed(seed)
        noise = Noise([seed], (3, 5))
        assert torch.equal(noise.initial()[0], torch.randn(3, 5, generator=g))
        assert torch.equal(noise.draw()[0], torch.randn(3, 5, generator=g))


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [0, 5, *(2**k for k in range(64)), 5 + 2**32, 5 + 2**40, 2**64 - 1]
    drawn = Noise(seeds, (8,)).initial()
    assert len({tuple(row.tolist()) for row in drawn}) == len(set(seeds))
    many = Noise([2**33 + 5], (20_000,)).initial()
    assert abs(float(many.mean())) < 0.03 and float(many.std()) == pytest.approx(1, abs=0.02)
    again = make_generator(2**33 + 5)
    assert torch.equal(many[0], torch.randn(20_000, generator=again))
    other = Noise([5], (20_000,)).initial()
    assert abs(float((many * other).mean())) < 0.03


@pytest.mark.parametrize("seeds", [[-1], [2**64], [1.9], "12", ["3"], 5, [True], []], ids=repr)
def test_what_is_no_seed_is_refused(seeds: Any) -> None:
    with pytest.raises(BadInput, match="seed"):
        Noise(seeds, (2,)).initial()


def test_image_k_is_of_seed_plus_k_beyond_32_bits_too() -> None:
    model = hasten.load("fashion")
    setting: dict[str, Any] = {"steps": 1, "sampler": "ddim", "times": "trailing", "guidance_scale": 1.0, "label": 0}
    first = 2**32 - 2
    both = model.sample(4, seed=first, **setting)
    for k in range(4):
        assert torch.allclose(model.sample(1, seed=first + k, **setting)[0], both[k], atol=1e-4)
    assert not torch.allclose(both[2], model.sample(1, seed=0, **setting)[0], atol=1e-2)
    with pytest.raises(BadInput, match=f"at most {2**64 - 2}"):
        model.sample(2, seed=2**64 - 1, **setting)
    with pytest.raises(BadInput, match="at least 0"):
        model.sample(2, seed=-1, **setting)


def test_numpy_and_tensor_integers() -> None:
    model = hasten.load("fashion")
    plain = model.sample(2, seed=3, steps=2, sampler="ddim", guidance_scale=1.0)
    for kind in (np.int64, np.uint8, torch.tensor):
        made = model.sample(kind(2), seed=kind(3), steps=kind(2), sampler="ddim", guidance_scale=1.0)
        assert torch.equal(made, plain)
    assert torch.equal(UniformLambda()(VPLinear(), np.int64(4)), UniformLambda()(VPLinear(), 4))
    for wrong in (2.0, np.float64(2), True, np.bool_(True), torch.tensor(2.0), torch.tensor([1, 2]), "2"):
        with pytest.raises(BadInput, match="whole number"):
            model.sample(wrong, steps=2)


def test_the_same_call_draws_the_same_images() -> None:
    noise = Noise(range(4), (2,))
    noise.draw()
    for sampler in (DDIM(), DDPM(), PredictorCorrector()):
        one, two = (draw(m2(VPLinear()), sampler, UniformLambda(), noise, steps=4) for _ in range(2))
        assert torch.equal(one, two)


def test_seeding_inside_leaves_the_numbers_outside() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with global_seed(11):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(4), expected)
    with global_seed(11):
        assert torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize(
    "spec",
    [
        "first_step",
        "noise_level:steps=2,batch_size=4",
        "second_moment:steps=3,images=40,batch=4,width=16,blocks=1",
        "moments:times=4,images=16",
        "attributes:steps=5,views=1,knots=3",
        "auxiliary:rank=8,iterations=3,levels=(2,5)",
    ],
)
def test_tuners_touch_no_global_generator(spec: str) -> None:
    schedule = VPCosine(offset=0.0)
    with global_seed(0):
        net = UNet(1, widths=(16, 32), classes=2).eval().requires_grad_(False)
        data = torch.rand(60, 1, 8, 8) * 2 - 1
    task = TuningTask(
        denoiser=Denoiser(net, schedule, "v"), sampler=UniPC(2), times=UniformLambda()(schedule, 4), shape=(1, 8, 8),
        labels=lambda n: torch.arange(n) % 2, images=lambda n: (data[:n], torch.arange(60)[:n] % 2), seed=5, n=40,
    )  # fmt: skip
    torch.manual_seed(123)
    np.random.seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    pick("tuning", spec).tune(task)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_training_and_distilling_leave_the_numbers_outside(tmp_path: Path) -> None:
    data = tmp_path / "images.npy"
    np.save(data, (np.arange(40 * 64) % 251).astype(np.uint8).reshape(40, 8, 8))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    setting: dict[str, Any] = {"steps": 1, "widths": (16, 16), "patch": 1, "batch_size": 4, "precision": "fp32"}
    train_model(data, tmp_path / "model", **setting)
    assert torch.equal(before, torch.get_rng_state())
    hasten.distill_model(
        hasten.load(tmp_path / "model"),
        tmp_path / "student",
        "consistency:steps=1",
        data=data,
        batch_size=4,
        minutes=0.01,
        precision="fp32",
    )
    assert torch.equal(before, torch.get_rng_state())
