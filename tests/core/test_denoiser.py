"""A denoiser says what is wrong with a time, keeps to its schedule, and answers with tensors of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import CACHED_TIMES, Denoiser, Wrapper
from hasten.errors import BadInput, HastenError
from hasten.guides import CFG, DynamicThreshold, Rescale
from hasten.plan.draw import draw
from hasten.samplers import UniPC
from hasten.sampling import Noise
from hasten.schedules import Discrete, Flow, VPCosine, VPLinear
from hasten.times import UniformLambda


class Net(nn.Module):
    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return torch.tanh(2 * x)


class Static(nn.Module):
    """Writes every answer into one tensor, as networks with static buffers do."""

    buffer: Tensor | None = None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.buffer is None:
            self.buffer = torch.empty_like(x)
        return self.buffer.copy_(torch.tanh(2 * x))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
@pytest.mark.parametrize("schedule", [Discrete.linear(), VPLinear(), Flow()], ids=lambda s: type(s).__name__)
def test_times_outside_are_refused(schedule: Any, prediction: str) -> None:
    denoiser, x = Denoiser(Net(), schedule, prediction), torch.zeros(2, 3)
    nan = float("nan")
    for t in (999, 1.5, -0.1, nan, torch.tensor(999), torch.tensor([999, 0]), torch.tensor([0.5, nan])):
        with pytest.raises(BadInput, match=r"\[0, 1\]"):
            denoiser(x, t)
    with pytest.raises(BadInput, match="here 0.5"):
        denoiser(x, 499)
    denoiser(x, 0.5), denoiser(x, torch.tensor([0.5, 1e-3])), denoiser(x, 0.9 + 1e-12)


def test_what_coefficients_were_computed_from_cannot_change() -> None:
    denoiser = Denoiser(Net(), VPLinear(), "v")
    for name, value in (("schedule", Flow()), ("prediction", "eps"), ("clock", "lam")):
        with pytest.raises(BadInput, match=rf"replace\({name}="):
            setattr(denoiser, name, value)
    other = denoiser.replace(schedule=Flow())
    x = torch.ones(2, 3)
    assert torch.equal(other(x, 0.5), other(x, torch.full((2,), 0.5))) and not torch.equal(
        other(x, 0.5), denoiser(x, 0.5)
    )


@pytest.mark.parametrize("prediction", ["x0", "v", "eps", "flow"])
def test_a_network_may_reuse_its_output(prediction: str) -> None:
    noise = Noise([0], (4,))
    one, two = (
        draw(Denoiser(net, VPLinear(), prediction), UniPC(3), UniformLambda(), noise, steps=8)
        for net in (Static(), Net())
    )
    assert torch.equal(one, two)


def test_the_table_of_times_is_emptied() -> None:
    """A service that asks at ever new times must not keep them all."""
    denoiser, x = Denoiser(Net(), VPLinear(), "v"), torch.zeros(1, 1)
    for k in range(CACHED_TIMES + 50):
        denoiser.raw(x, (k + 1) / (CACHED_TIMES + 60))
    assert len(denoiser._cache) <= CACHED_TIMES


class Doubled(Wrapper):
    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        return 2 * self.denoiser(x_t, t, **cond)


class Watched(Wrapper):
    """Changes nothing."""


def test_answers_past_a_wrapper_are_refused() -> None:
    """`raw` of the inner denoiser would leave out what the wrapper does."""
    inner, x = Denoiser(Net(), VPLinear(), "v"), torch.ones(1, 2)
    assert torch.equal(Watched(inner).raw(x, 0.5), inner.raw(x, 0.5))
    for name in ("raw", "moments"):
        assert not hasattr(Doubled(inner), name)
        with pytest.raises(HastenError, match=f"Doubled changes .* {name!r}"):
            getattr(Doubled(inner), name)
    assert Doubled(inner).schedule == VPLinear() and Doubled(inner).time_input(0.5) == inner.time_input(0.5)


def test_rescaled_guidance_of_samples_of_one_number() -> None:
    """The deviation of one number is 0, and the scale of a network that says the same everywhere is left alone."""
    from hasten.exact import GaussianMixture

    exact = GaussianMixture(
        torch.ones(2), torch.tensor([[0.5], [-0.5]]), torch.full((2, 1), 0.1), VPLinear(), labels=[0, 1]
    )
    guided = Rescale(0.7).wrap(CFG(3.0).wrap(exact))
    found = guided(torch.randn(3, 1), 0.5, label=torch.tensor([0, 1, 0]))
    assert bool(torch.isfinite(found).all())


def test_large_samples_are_thresholded() -> None:
    """torch.quantile takes 2^24 values at most; a video has more."""

    class Ramp(nn.Module):
        schedule = VPCosine()

        def forward(self, x: Tensor, t: Any) -> Tensor:
            return x

    n = 2**24 + 8
    x = torch.linspace(-2, 2, n)[None]
    found = DynamicThreshold(quantile=0.75).wrap(Ramp())(x, 0.5)
    assert float(found.abs().max()) == 1.0 and float(found[0, n // 2 + n // 8]) == pytest.approx(1 / 3, abs=1e-3)
    small = torch.randn(3, 1000)
    size = small.abs()
    S = torch.quantile(size, 0.9, dim=1).clamp_min(1.0)[:, None]
    assert torch.allclose(DynamicThreshold(0.9).wrap(Ramp())(small, 0.5), small.clamp(-S, S) / S, atol=1e-6)
